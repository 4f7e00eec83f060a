"""The references as commands: answers, token ids in traces, and one line with exit code 2 for unusable input."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from reference import meta
from reference.files import open_folder
from reference.hf_text import HfText
from reference.meta_text import open_text
from reference.oracle import forward as oracle
from reference.oracle.__main__ import main as oracle_main
from reference.oracle.run import next_tokens
from reference_checkpoints import Shape, make_weights, write_hf, write_meta

SHAPE = replace(Shape(), vocab_size=330)
TEXTS = ["the cat sat", "on the mat, twice", ""]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Meta folder and a Hugging Face folder, each with a small sentencepiece tokenizer."""
    root = tmp_path_factory.mktemp("commands")
    weights = make_weights(SHAPE)
    weights["output.weight"][:259] = 0  # no special and no byte pieces: the packages render broken UTF-8 differently
    write_meta(root / "meta", SHAPE, weights)
    write_hf(root / "hf", SHAPE, weights)
    model = io.BytesIO()
    text = ["the cat sat on the mat and the dog sat on the log", "twice the cat, once the dog"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for name in ("meta", "hf"):
        (root / name / "tokenizer.model").write_bytes(model.getvalue())
    return root


def write_case(path: Path, checkpoint_folder: Path, **changes: Any) -> Path:
    values = {
        "schema": "nanollama.case/1",
        "checkpoint": str(checkpoint_folder),
        "dtypes": ["fp32"],
        "prompts": [[1, 5]],
    }
    path.write_text(json.dumps(values | changes))
    return path


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, list[str]]:
    """What each module prints after a case with texts and an answer to a prompt: the lines, without progress."""
    case = write_case(folder / "texts.json", folder / "hf", prompts=None, texts=TEXTS[:2], corpus=TEXTS, dialogs=[[]])
    processes = {}
    for module in ("meta", "hf", "oracle"):
        ask = ["--ckpt", str(folder / "meta"), "--prompt", "the cat", "--max_new_tokens", "6", "--dtype", "fp32"]
        lines = [["--case", str(case), "--out", str(folder / module)], ask]
        where = {"oracle": "oracle.__main__"}.get(module, module)
        program = f"from reference.{where} import main; [main(line) for line in {lines!r}]"
        processes[module] = subprocess.Popen(
            [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    answers = {}
    for module, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        answers[module] = [line for line in out.splitlines() if not line.startswith('{"stage"')]
    return answers


def test_a_prompt_prints_the_same_greedy_answer(answers: dict[str, list[str]], folder: Path) -> None:
    assert len(answers["meta"]) == 1
    assert answers["meta"][0].strip() == answers["hf"][0].strip()


def test_the_oracle_prints_the_likeliest_tokens_with_margins(answers: dict[str, list[str]], folder: Path) -> None:
    header, first, *rest = answers["oracle"]
    assert header.split() == ["token", "logit", "margin", "text"]
    assert len(rest) == 4
    text = open_text(open_folder(folder / "meta"), None)
    tokens = text.encode("the cat", bos=True)
    best = next_tokens(open_folder(folder / "hf"), tokens, "fp32")
    assert int(first.split()[0]) == best[0][0]
    assert float(first.split()[2]) == 0


@pytest.mark.usefixtures("answers")
def test_texts_become_sequences_with_each_ones_own_tokenizer(folder: Path) -> None:
    meta, hf, third = (json.loads((folder / m / "trace.json").read_text()) for m in ("meta", "hf", "oracle"))
    assert meta["token_ids"] == hf["token_ids"] == meta["sequences"] == third["sequences"]
    assert meta["corpus_ids"] == hf["corpus_ids"] == [ids[1:] for ids in meta["token_ids"]] + [[]]
    assert meta["dialog_ids"] is None  # Llama 2's chat format is not in llama_models
    assert third["token_ids"] is None


def test_llama3_ids_and_dialogs(llama3_tokenizer_path: Path) -> None:
    text = open_text(None, str(llama3_tokenizer_path))
    assert text.encode("Hello", bos=True) == [128000, 9906]
    assert text.encode("<|eot_id|>", bos=False) != [128009]
    call = {"tool_name": "sum", "arguments": {"x": "1"}}
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "stop_reason": "end_of_message"},
        {"role": "tool", "content": "2"},
    ]
    ids = text.dialog(dialog)
    assert ids is not None
    rendered = text.decode(ids)
    assert rendered.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")
    assert '"sum"' in rendered
    assert "<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>" in rendered
    assert rendered.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_folders_own_chat_template_is_used(folder: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from reference.hf_text import open_tokenizer

    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} the cat{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=open_tokenizer(folder / "hf" / "tokenizer.model")._tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    text = HfText(open_folder(folder / "hf"), str(tmp_path / "tokenizer.json"))
    ids = text.dialog([{"role": "user", "content": "the dog"}])
    assert ids is not None
    assert text.decode(ids).split() == ["the", "dog", "the", "cat"]


USAGE_ERRORS = {
    ("--ckpt", "nowhere", "--prompt", "x"): "nowhere: no such folder",
    ("--ckpt", "meta", "--promt", "x"): "unknown flag --promt; did you mean --prompt?",
    ("--ckpt", "meta"): "--ckpt needs --prompt",
    ("--case", "x.json"): "--case needs --out",
    (): "give --case and --out, or --ckpt and --prompt",
    ("--ckpt", "meta", "--prompt", "x", "--dtype", "int4"): "--dtype: expected one of fp32, bf16, fp16, not 'int4'",
    ("--case", "nowhere.json", "--out", "o"): "nowhere.json: cannot be read",
}


@pytest.mark.parametrize("arguments", USAGE_ERRORS)
def test_a_usage_error_is_one_line_and_exit_2(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert command(arguments, monkeypatch, capsys).startswith("error: ")
    assert USAGE_ERRORS[arguments] in command(arguments, monkeypatch, capsys)


BAD_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "schema": ({"schema": "other/1"}, "is not a case"),
    "unknown key": ({"prompt": []}, "unknown key 'prompt'"),
    "dtype": ({"dtypes": ["fp8"]}, "dtypes should be from fp32, bf16, fp16"),
    "no dtype": ({"dtypes": []}, "dtypes should be"),
    "record": ({"record": "all"}, "record should be one of"),
    "empty prompt": ({"prompts": [[]]}, "prompt 0 is empty"),
    "token": ({"prompts": [[330]]}, "outside 0..329, the checkpoint's rows"),
    "positions": ({"positions": [[2]]}, "outside its 2 tokens"),
    "positions of another case": ({"positions": [[0], [0]]}, "there are 1"),
    "checkpoint": ({"checkpoint": "nowhere"}, "no such folder"),
}


@pytest.mark.parametrize("bad", BAD_CASES)
def test_a_bad_case_is_one_line_and_exit_2(
    bad: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = BAD_CASES[bad]
    case = write_case(tmp_path / "case.json", folder / "meta", **changes)
    line = ("--case", str(case), "--out", str(tmp_path / "out"))
    assert message in command(line, monkeypatch, capsys)
    assert not (tmp_path / "out" / "trace.json").exists()


def command(
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], int] = oracle_main,
) -> str:
    """The one line that a command prints on stderr."""
    monkeypatch.setattr(sys, "argv", ["reference", *arguments])
    assert main() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_what_metas_code_cannot_run_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = replace(Shape(), head_dim=8)
    checkpoint = write_hf(tmp_path / "hf", shape, make_weights(shape))
    line = ("--ckpt", str(checkpoint), "--prompt", "x")
    assert "head_dim 8 x 4 heads is not dim 64" in command(line, monkeypatch, capsys, meta.main)


def test_a_truncated_file_is_one_line_and_exit_2_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_meta(tmp_path / "meta", Shape(), make_weights(Shape()))
    shard = checkpoint / "consolidated.00.pth"
    shard.write_bytes(shard.read_bytes()[:9000])
    line = ["-m", "reference.oracle", "--ckpt", str(checkpoint), "--prompt", "x"]
    done = subprocess.run([sys.executable, *line], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert "is truncated or not a .pth file" in done.stderr


def test_row_blocks_do_not_move_the_oracle(tmp_path: Path) -> None:
    shape = replace(Shape(), hidden_dim=700, vocab_size=1100, n_heads=32, n_kv_heads=8)
    checkpoint = open_folder(write_hf(tmp_path / "hf", shape, make_weights(shape)))
    results = []
    for block_bytes in (1, 1 << 30):  # 256 rows at a time, and every matrix at once
        model = oracle.Oracle(checkpoint, [[3, 1, 4], [1, 5]], None, block_bytes=block_bytes)
        seen: dict[str, torch.Tensor] = {}
        normed = oracle.forward(model, seen.__setitem__)
        seen["logits"] = torch.cat([block for _, _, block in model.logit_blocks(normed)], dim=-1)
        results.append(seen)
    for tap, value in results[0].items():
        assert float((value - results[1][tap]).abs().max()) <= 1e-12 * float(value.abs().max()), tap
