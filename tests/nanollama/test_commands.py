"""`python -m nanollama generate` and `inspect`, on a small Meta folder and on a real 260K-parameter model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanollama import __main__ as commands
from nanollama.checkpoint import open_checkpoint, write_hf, write_meta
from nanollama.cli import run
from nanollama.describe import published_name
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import ModelConfig, RopeScaling, Transformer
from nanollama.options import Drawing, ModelOptions

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=128256, hidden_dim=32, rope_scaling=RopeScaling()
)

# What llama2.c's own test expects of this model: greedy, 200 tokens from BOS.
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama3_tokenizer_path: Path) -> Path:
    """A Meta folder in bf16 with the Llama 3 tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("commands") / "meta"
    weights = Transformer(CONFIG).state_dict()
    write_meta(path, CONFIG, weights, tokenizer=llama3_tokenizer_path, dtype=torch.bfloat16)
    return path


def test_a_real_model_tells_its_known_story(
    test_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = str(test_data("stories260K.bin")), test_data("tok512.bin")
    commands.generate(model, drawing=Drawing(200), model=ModelOptions(tokenizer))  # no prompt: from BOS
    out, err = capsys.readouterr()
    assert out == STORY + "\n"
    assert err.startswith("prefill 1 tokens at ")
    assert "decode 199 tokens at " in err


def test_a_real_model_continues_each_prompt_of_a_batch(
    test_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = str(test_data("stories260K.bin")), test_data("tok512.bin")
    prompts = ["Once upon a time", STORY[: STORY.index(" One day")], ""]
    options = ModelOptions(tokenizer=tokenizer)
    commands.generate(model, prompt=prompts, drawing=Drawing(40), stop=["\n", "outside"], model=options, json=True)
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["prompt"] for answer in answers] == [0, 1, 2]
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = prompt + answer["text"]
        assert STORY.startswith(whole)
        assert STORY[len(whole) :].startswith(("\n", "outside")) == (answer["finish"] == "stop")


def test_prompts_come_from_files_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("Hello\n\nline one\\nline two\n")
    (tmp_path / "p.jsonl").write_text("[128000, 9906]\n[128000, 1074, 832, 198, 1074, 1403]\n")
    answers = []
    for name in ("p.txt", "p.jsonl"):
        commands.generate(str(folder), prompts=tmp_path / name, drawing=Drawing(3, temperature=1.0), n=2, json=True)
        answers.append(json.loads(capsys.readouterr().out)["answers"])
    assert [(answer["prompt"], answer["answer"]) for answer in answers[0]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert answers[0] == answers[1]


def test_several_answers_are_told_apart_and_logprobs_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.generate(str(folder), prompt=["a", "b"], drawing=Drawing(2, temperature=1.0), n=2, logprobs=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("---")] == [
        "--- prompt 0, answer 0",
        "--- prompt 0, answer 1",
        "--- prompt 1, answer 0",
        "--- prompt 1, answer 1",
    ]


def test_weights_that_keep_their_dtype_stay_in_the_file(folder: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped where")
    ranges = {"bf16": 0, "fp32": 0}
    for dtype in ranges:
        weight = Llama.load(folder, dtype=dtype).model.tok_embeddings.weight
        for line in maps.read_text().splitlines():
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= weight.data_ptr() < stop and "consolidated" in line:
                ranges[dtype] += 1
    assert ranges == {"bf16": 1, "fp32": 0}


def test_both_formats_give_the_same_answer(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    write_hf(tmp_path / "hf", checkpoint.config, checkpoint.weights)
    events = [
        list(
            Llama.load(path, dtype="fp32").generate([[128000, 5, 6]], Sampling(max_new_tokens=5, stop_ids=frozenset()))
        )
        for path in (folder, tmp_path / "hf")
    ]
    assert [(event.token, event.logprob) for event in events[0]] == [(e.token, e.logprob) for e in events[1]]


def test_inspect_says_what_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.inspect(str(folder))
    out = capsys.readouterr().out
    assert "format meta, no published shape, 4,108,880 parameters in bf16" in out
    assert "rope_scaling   factor 8.0" in out
    assert "kind           llama3" in out
    assert "layers.*.attention.wk.weight           8 x 16             bf16  x 2" in out


def test_inspect_json_has_every_tensor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.inspect(str(folder), json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "meta"
    assert facts["config"]["rope_scaling"]["factor"] == 8.0
    assert facts["tensors"]["layers.1.attention.wk.weight"] == {"shape": [8, 16], "dtype": "bf16"}
    assert facts["parameters"] == 4_108_880
    assert len(facts["tensors"]) == 2 * 9 + 3


def test_convert_writes_what_inspect_then_finds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.convert(str(folder), tmp_path / "hf", format="hf", dtype="fp32")
    line = f"{tmp_path / 'hf'}: format hf, no published shape, 4,108,880 parameters in fp32"
    assert capsys.readouterr().out == line + "\n"
    commands.inspect(str(tmp_path / "hf"))
    assert capsys.readouterr().out.startswith(line + "\n")


def test_published_shapes_have_names() -> None:
    shape = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "hidden_dim": 14336, "vocab_size": 128256}
    assert published_name(ModelConfig(**shape)) == "Llama 3 8B"
    assert published_name(ModelConfig(**shape, rope_scaling=RopeScaling())) == "Llama 3.1 8B"
    assert published_name(CONFIG) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "nowhere/at-all/here", "--prompt", "x"], "nowhere/at-all/here: does not exist"),
        (["generate", "FOLDER", "--prompts", "/dev/null"], "--prompts /dev/null: there is no prompt in it"),
        (["generate", "FOLDER", "--prompt", "x", "--dtype", "int8"], "--dtype: expected one of fp32, bf16, fp16"),
        (["generate", "FOLDER", "--prompt", "x", "--top_p", "2"], "top_p is 2.0"),
        (["generate", "FOLDER", "--prompt", "x", "--tokenizer", "no.model"], "no.model"),
        (["generate", "FOLDER", "--prompts", "no.txt"], "no.txt: No such file or directory"),
        (["convert", "FOLDER", "FOLDER/x"], "--format is missing"),
        (["convert", "FOLDER", "FOLDER/x", "--format", "llama2c"], "must end in .bin"),
        (["inspect", "FOLDER/params.json"], "is one file of several: give its folder"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(commands.COMMANDS, [part.replace("FOLDER", str(folder)) for part in argv])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
