"""The way of a new user: each step is the line that the step before it printed, none is refused, each one helps."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from finetune import interrupts
from finetune.metrics import read_metrics
from finetune.prepare.stories import stories
from nanollama.checkpoint import open_checkpoint
from nanollama.generation.llama import Llama, Sampling

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def command(line: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """What a shell in `folder` makes of `python -m ...`, offline."""
    words = shlex.split(line)
    assert words[0] == "python", line
    where = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    where["NANOLLAMA_CACHE"] = str(folder / "cache")
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=where, input=stdin, capture_output=True, text=True
    )


def printed(said: str) -> dict[str, str]:
    """What for -> the line, of the "next:" at a run's end."""
    rows = [row.partition(":") for row in said.partition("next:\n")[2].splitlines()]
    return {what.strip(): line.strip() for what, _, line in rows}


def train(line: str, folder: Path) -> tuple[dict[str, str], Path]:
    """A run that must help: what it printed as next, and its folder."""
    done = command(line, folder)
    assert done.returncode == 0, (line, done.stderr, done.stdout)
    assert "verdict: better than where it began by " in done.stdout, done.stdout
    lines = printed(done.stdout)
    out = Path(shlex.split(lines["check"])[-1]).parent
    checks = [e["val_loss"] for e in read_metrics(folder / out / "metrics.jsonl") if "val_loss" in e]
    assert min(checks[1:]) < checks[0]
    return lines, out


def write_data(folder: Path) -> None:
    texts = [text.replace("Once upon a time", "LONG AGO").replace("the", "ze") for text in stories(60, seed=3)]
    (folder / "NOTES.txt").write_text("<|endoftext|>".join(texts))
    turns = [("user", "Tell me of number {}."), ("assistant", "It was a good day, and number {} was happy.")]
    rows = [{"messages": [{"role": r, "content": t.format(i)} for r, t in turns]} for i in range(60)]
    (folder / "DIALOGS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SMALL = (
    " --data first.txt --init shape.json --vocab_size 300 --seq_len 192 --batch_size 4 --max_steps 60 --lr 0.01"
    " --threads 1 --workers 1"
)


@pytest.mark.parametrize(
    ("bare", "more"), [(SMALL, " --max_steps 60 --batch_size 2"), pytest.param("", "", marks=pytest.mark.slow)]
)
def test_from_nothing_to_a_gguf_that_chats(bare: str, more: str, tmp_path: Path) -> None:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    (tmp_path / "first.txt").write_text("<|endoftext|>".join(stories(100)))
    write_data(tmp_path)

    lines, _ = train(f"python -m finetune.tinystories{bare} --out out/one", tmp_path)
    assert lines["talk to it"].startswith("python -m nanollama generate --ckpt out/one/final --prompt ")
    lines, adapted = train(f"{lines['train it on']} --out out/two{more}", tmp_path)
    assert (tmp_path / adapted / "adapter" / "adapter_model.safetensors").exists()
    lines, chat = train(f"{lines['teach it to chat']} --out out/three{more}", tmp_path)
    assert list((tmp_path / chat).glob("report.*"))

    answered = command(f"{lines['talk to it']} --max_new_tokens 8", tmp_path, stdin="Tell me of number 7.\n")
    assert answered.returncode == 0, answered.stderr
    made = command(lines["GGUF"], tmp_path)
    assert made.returncode == 0, made.stderr
    assert lines["llama.cpp"] == f"llama-server -m {chat / 'model.gguf'}"
    assert lines["Ollama"].startswith(f"echo FROM ./model.gguf > {chat / 'Modelfile'} && ollama create three -f ")
    events = list(Llama.load(tmp_path / chat / "model.gguf").generate(["One day"], Sampling(max_new_tokens=3)))
    assert 1 <= len(events) <= 3
    made = command(lines["for transformers"].partition("   (")[0], tmp_path)
    assert made.returncode == 0 and open_checkpoint(tmp_path / chat / "final-hf").format == "hf"

    for wrong in (f"generate --ckpt {adapted}", f"inspect {adapted}"):
        refused = command(f"python -m nanollama {wrong}", tmp_path)
        assert refused.returncode == 2 and f"give its model, {adapted / 'final'}" in refused.stderr, refused.stderr
    refused = command(f"python -m nanollama generate --ckpt {adapted / 'adapter'}", tmp_path)
    assert refused.returncode == 2 and f"--adapter {adapted / 'adapter'}" in refused.stderr


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
def test_peft_opens_the_adapter_by_the_base_that_it_names(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "first.txt").write_text("<|endoftext|>".join(stories(100)))
    shape = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    done = command(f"python -m finetune.tinystories{SMALL} --max_steps 3 --out one", tmp_path)
    line = "python -m finetune.text --data first.txt --ckpt one/final --method lora --max_steps 2 --export hf --out two"
    done = command(f"{line} --threads 1", tmp_path)
    assert done.returncode == 0, done.stderr
    from peft import AutoPeftModelForCausalLM

    opened = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "two" / "adapter"))
    stored = safetensors.torch.load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    worn = opened.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert (worn == stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]).all()


SLOW_TORCH = """
import builtins, runpy, sys, time
real = builtins.__import__
def importing(name, *more, **named):
    if name == "torch":
        print("importing", flush=True)
        time.sleep(60)
    return real(name, *more, **named)
builtins.__import__ = importing
sys.argv = ["text", "--data", "x.txt"]
runpy.run_module("finetune.text", run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def started(*line: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more) as process:
        yield process
        process.kill()


@pytest.mark.usefixtures("cold_processes")
def test_an_interrupt_during_the_imports_is_one_line() -> None:
    # A shell's background jobs ignore SIGINT, and so would their children.
    normal = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with started(sys.executable, "-c", SLOW_TORCH, cwd=REPOSITORY, **normal) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, interrupts.WORD + "\n")
