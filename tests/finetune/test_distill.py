"""Distillation: loss and gradients against float64 and plain torch, packing, chunks, whole runs, refusals."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from finetune import loss as loss_module
from finetune.data.dialogs import joined
from finetune.data.documents import IGNORE
from finetune.distill import Distilled, DistillLoss, DistillModel, Recipe
from finetune.metrics import read_metrics
from finetune.parallelize import World
from finetune.prepare.stories import stories
from finetune.prepare.tokenizer import train_tokenizer
from finetune.text import ENTRY
from finetune.train import accumulate_
from nanollama.checkpoint import open_checkpoint
from small_runs import base, exit_code, stopped_at

CPU, FP32 = World(torch.device("cpu")), torch.autocast("cpu", enabled=False)
RECIPES = [Recipe(1.0, 1.0), Recipe(2.0, 0.7), Recipe(1.0, 0.3)]


def drawn(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden, head, labels, where it is taught, the teacher's states and head."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, states, other = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((n, 6), (vocab, 6), (n, 9), (vocab, 9))
    )
    labels = torch.randint(0, vocab, (n,), generator=generator)
    taught = torch.rand(n, generator=generator) < 0.8
    labels[torch.rand(n, generator=generator) < 0.3] = IGNORE
    return hidden.requires_grad_(), head.requires_grad_(), labels, taught, states, other


def chunked(how: Recipe, given: tuple[Tensor, ...]) -> list[Tensor]:
    hidden, head, labels, taught, states, other = given
    loss, _ = DistillLoss.apply(hidden, head, labels, taught, states, lambda x: F.linear(x, other), how)
    (loss / 7).backward()
    return [loss.detach(), hidden.grad, head.grad]


def plain(how: Recipe, given: tuple[Tensor, ...]) -> list[Tensor]:
    """As a loop around torch's own losses writes it."""
    hidden, head, labels, taught, states, other = (t.detach() for t in given)
    hidden.requires_grad_(), head.requires_grad_()
    mine, theirs = hidden @ head.T, states @ other.T
    log_q, log_p = (F.log_softmax(x[taught] / how.temperature, dim=1) for x in (mine, theirs))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") * how.temperature**2
    nats = F.cross_entropy(mine, labels, ignore_index=IGNORE, reduction="sum")
    loss = how.mix * kl + (1 - how.mix) * nats
    (loss / 7).backward()
    return [loss.detach(), hidden.grad, head.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("how", RECIPES, ids=str)
def test_float64_equals_the_plain_losses(how: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 1)  # many chunks
    for a, b in zip(*(fn(how, drawn(300, 50, torch.float64)) for fn in (chunked, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", RECIPES, ids=str)
def test_error_in_fp32_is_within_g8_of_the_plain_losss_own(how: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 1)
    given = drawn(2000, 300, torch.float32)
    exact = plain(how, tuple(t.double() if t.is_floating_point() else t for t in given))
    mine, theirs = chunked(how, given), plain(how, given)
    for m, t, e in list(zip(mine, theirs, exact, strict=True))[1:]:
        off = [float((x.double() - e).square().mean().sqrt()) for x in (m, t)]
        assert off[0] <= 3 * max(off[1], 6e-8 * float(e.square().mean().sqrt()) / 2)
    assert float(mine[0]) == pytest.approx(float(exact[0]), rel=1e-6)


WRONG = {  # what has been written in place of each: none may pass for the loss
    "the other direction": lambda p, q, heat: heat**2 * (q.exp() * (q - p)).sum(),
    "no temperature squared": lambda p, q, heat: (p.exp() * (p - q)).sum(),
    "temperature of one side": lambda p, q, heat: heat**2 * (p.exp() * (p - F.log_softmax(q * heat, 1))).sum(),
    "mean over the vocabulary": lambda p, q, heat: heat**2 * (p.exp() * (p - q)).mean(),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_usual_mistake_passes_for_it(name: str) -> None:
    hidden, head, labels, taught, states, other = (t.detach() for t in drawn(40, 30, torch.float64))
    p, q = (F.log_softmax(x[taught] / 2, dim=1) for x in (states @ other.T, hidden @ head.T))
    loss = DistillLoss.apply(hidden, head, labels, taught, states, lambda x: F.linear(x, other), Recipe(2.0, 1.0))[0]
    assert abs(float(WRONG[name](p, q, 2.0)) - float(loss)) > 0.02 * float(loss)


def test_no_tensor_of_all_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    given = drawn(1024, 4096, torch.float32)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 4 * 64 * 4096)
    with Sizes():
        chunked(RECIPES[1], given)
    assert max(sizes) == 64 * 4096


@pytest.mark.parametrize("everywhere", [False, True])
def test_packed_documents_are_each_document_alone(everywhere: bool) -> None:
    student, teacher = tiny.model(61).train(), tiny.model(61, seed=5)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for n in (7, 23, 3, 12):
        ids = torch.cat([torch.tensor([1]), torch.randint(3, 61, (n,), generator=generator)]).numpy()
        parts.append((ids, np.arange(n + 1) > n // 2))
    objective = Distilled(teacher, Recipe(2.0, 0.5), everywhere)
    found = []
    for documents in ([joined(parts, 1)], [joined([part], 1) for part in parts]):
        student.zero_grad()
        packers = [objective.packer(d, 64, seed=0, doc_mask=True) for d in documents]
        batches = [p.batch([list(range(len(d.lengths)))]) for p, d in zip(packers, documents, strict=True)]
        count = sum(batch.count for batch in batches)
        assert count == (45 if everywhere else sum(int(said.sum()) for _, said in parts))
        model = DistillModel(student, teacher, objective.how)
        loss = float(accumulate_(model, batches, count, FP32, CPU)) / count
        found.append((loss, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, grad in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories, a tokenizer, a teacher, and one with another tokenizer."""
    folder, texts = tmp_path_factory.mktemp("distill"), stories(40)
    (folder / "stories.txt").write_text("<|endoftext|>".join(texts))
    for name, words in (("t", 300), ("other", 310)):
        train_tokenizer(texts, words, folder / f"{name}.model")
        base(folder / f"teacher-{name}", folder / f"{name}.model", 128, dim=48, hidden_dim=64)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48}
    (folder / "shape.json").write_text(json.dumps(shape))
    return folder


def run(home: Path, out: Path, *flags: str) -> int | str | None:
    """The exit code of a run of 8 steps from scratch, in this process."""
    line = ["--data", str(home / "stories.txt"), "--init", str(home / "shape.json"), "--cache", str(home / "cache")]
    small = "--seq_len 64 --batch_size 2 --max_steps 8 --eval_every 4 --lr 0.01 --threads 1 --dropout 0.1"
    argv = [*line, "--tokenizer", str(home / "t.model"), *small.split(), "--out", str(out), *flags]
    return exit_code(ENTRY, *argv)


WAYS = {
    "teacher": ["--teacher", "HOME/teacher-t", "--temperature", "2", "--distill_mix", "0.9", "--distill_on", "all"],
    "int8 teacher": ["--teacher", "HOME/teacher-t", "--teacher_quantize", "int8"],
    "muon": ["--optimizer", "muon"],
    "ema": ["--ema", "0.9"],
}


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_resumes_bit_by_bit(
    home: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [flag.replace("HOME", str(home)) for flag in WAYS[way]]
    assert run(home, tmp_path / "straight", *flags) == 0
    with stopped_at(3):
        assert run(home, tmp_path / "stopped", *flags) == 128 + signal.SIGTERM
    assert run(home, tmp_path / "stopped", *flags, "--resume") == 0
    drop = {"tokens_per_s", "peak_bytes"}
    lines = [[{k: v for k, v in e.items() if k not in drop} for e in read_metrics(tmp_path / o / "metrics.jsonl")]
             for o in ("straight", "stopped")]  # fmt: skip
    assert lines[0] == lines[1]
    steps = [line for line in lines[0] if "loss" in line]
    assert len(steps) == 8 and steps[-1]["loss"] < steps[0]["loss"]
    assert ("kl" in steps[0]) == ("teacher" in way)
    weights = [open_checkpoint(tmp_path / o / "final").weights for o in ("straight", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature 2", "--temperature is about a teacher: name one with --teacher"),
        ("--teacher HOME/teacher-t --distill_mix 0", "expected a share above 0"),
        ("--teacher HOME/teacher-other", "a teacher needs the student's tokenizer"),
        ("--teacher HOME/teacher-t --seq_len 200", "was made for at most 128 tokens: lower --seq_len"),
        ("--ema 1", "--ema 1.0: expected at least 0 and less than 1"),
        ("--optimizer muon --method norms", "--optimizer muon is for whole matrices"),
        ("--lora_plus 4", "--lora_plus goes with --method lora or qlora"),
        ("--beta 1", "--beta is finetune.preference's: finetune.text has no use for it"),
    ],
)
def test_unusable_flags_are_one_line(
    home: Path, tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "out", *flags.replace("HOME", str(home)).split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
