"""finetune.preference: reading pairs, every loss against float64 and trl, packing, the cached reference, whole runs."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from finetune import reference as reference_module
from finetune.build import add_dropout_
from finetune.config import TrainConfig
from finetune.data.dialogs import joined
from finetune.data.pairs import PairPacker, Pairs, as_pair, read_pairs
from finetune.data.shapes import as_dialogue
from finetune.errors import UserError
from finetune.loss import plain_cross_entropy, token_log_probs
from finetune.metrics import read_metrics
from finetune.pairwise import LOSSES, PairLossModel, pair_loss, sequence_log_probs
from finetune.parallelize import World
from finetune.preference import ENTRY
from finetune.prepare.stories import stories
from finetune.reference import make_reference, model_digest, score_pairs, summed_divergence
from finetune.train import accumulate_
from nanollama.checkpoint import open_checkpoint
from nanollama.model import Transformer
from nanollama.tokenizer import open_tokenizer
from small_runs import base, exit_code, stopped_at, tokenizer

CPU = World(torch.device("cpu"))
FP32 = torch.autocast("cpu", enabled=False)
VOCAB, BETA = 61, 0.3
Sequence = tuple[list[int], int]  # ids, and the number of the first one that is judged


# --- Losses and gradients ------------------------------------------------------------------------------------------


def drawn_pairs(count: int = 5, seed: int = 0) -> list[tuple[Sequence, Sequence]]:
    """Prompts and two answers each, all of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    found = []
    for _ in range(count):
        prompt = [1, *ids(2, 9)]
        answers = [(prompt + ids(1, 12) + [2], len(prompt)) for _ in range(2)]
        found.append((answers[0], answers[1]))
    return found


def as_documents(pairs: list[tuple[Sequence, Sequence]], reference: Tensor | None = None) -> Pairs:
    sequences = [side for pair in pairs for side in pair]
    masked = [(torch.tensor(ids).numpy(), (torch.arange(len(ids)) >= first).numpy()) for ids, first in sequences]
    return Pairs(joined(masked, 1), reference)


def plain_log_probs(model: Transformer, side: Sequence) -> Tensor:
    """log p of each judged token of one sequence, alone in its row."""
    ids, first = side
    logits = model.hidden(torch.tensor([ids]))[0] @ model.head().T  # the float32 of `logits` is not fine enough
    return F.log_softmax(logits, dim=1)[range(first - 1, len(ids) - 1), ids[first:]]


def textbook(kind: str, model: Transformer, pairs: list[tuple[Sequence, Sequence]], reference: Tensor) -> Tensor:
    """Mean loss of the pairs, written from the papers, one sequence after another."""
    losses = []
    for (chosen, rejected), (r_c, r_j) in zip(pairs, reference.to(model.head().dtype), strict=True):
        c, j = plain_log_probs(model, chosen), plain_log_probs(model, rejected)
        if kind == "orpo":
            odds = [p.mean().exp() / (1 - p.mean().exp()) for p in (c, j)]
            losses.append(-c.mean() - BETA * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))))
            continue
        if kind == "dpo":
            h = c.sum() - j.sum() - (r_c - r_j)
        else:
            h = (c.sum() - r_c) / len(c) - (j.sum() - r_j) / len(j)
        losses.append((h - 1 / (2 * BETA)) ** 2 if kind == "ipo" else -torch.log(torch.sigmoid(BETA * h)))
    return torch.stack(losses).mean()


def moved(model: Transformer, seed: int) -> Transformer:
    """The policy: the reference a little further on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def losses_and_grads(loss: Tensor, model: Transformer) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def ours(
    kind: str, dtype: torch.dtype, pairs: list[tuple[Sequence, Sequence]], reference: Tensor, seq_len: int = 48
) -> tuple[float, dict[str, Tensor]]:
    model = moved(tiny.model(VOCAB).train(), 1).to(dtype)
    packer = PairPacker(as_documents(pairs, reference), seq_len)
    batches = [packer.batch([row]) for row in packer.in_order(len(pairs))]
    assert (len(batches) > 1) == (seq_len < 100)
    loss = float(accumulate_(PairLossModel(model, kind, BETA), batches, len(pairs), FP32, CPU)) / len(pairs)
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def exact(kind: str, dtype: torch.dtype, pairs: Any, reference: Tensor) -> tuple[float, dict[str, Tensor]]:
    model = moved(tiny.model(VOCAB).train(), 1).to(dtype)
    return losses_and_grads(textbook(kind, model, pairs, reference), model)


def reference_of(pairs: list[tuple[Sequence, Sequence]]) -> Tensor:
    model = tiny.model(VOCAB).double()
    with torch.no_grad():
        return torch.stack([torch.stack([plain_log_probs(model, side).sum() for side in pair]) for pair in pairs])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("seq_len", [48, 400])
def test_loss_and_gradients_are_the_papers_in_float64(kind: str, seq_len: int) -> None:
    pairs = drawn_pairs()
    reference = reference_of(pairs)
    loss, grads = ours(kind, torch.float64, pairs, reference, seq_len)
    wanted, exact_grads = exact(kind, torch.float64, pairs, reference)
    assert loss == pytest.approx(wanted, rel=1e-6)  # RoPE and norms are fp32 in a float64 model, too
    for name, grad in exact_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))


@pytest.mark.parametrize("kind", LOSSES)
def test_error_in_fp32_is_within_g8_of_the_plain_losss_own(kind: str) -> None:
    pairs = drawn_pairs()
    reference = reference_of(pairs)
    oracle = exact(kind, torch.float64, pairs, reference)[1]
    mine, plain = ours(kind, torch.float32, pairs, reference)[1], exact(kind, torch.float32, pairs, reference)[1]
    for name, wanted in oracle.items():
        off = [float((grads[name].double() - wanted).square().mean().sqrt()) for grads in (mine, plain)]
        floor = max(off[1], 6e-8 * float(wanted.square().mean().sqrt()) / 2)
        assert off[0] <= 3 * floor, name


def test_log_probs_are_those_of_the_plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.loss.CHUNK_LOGITS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (200, 30))
    labels = torch.randint(0, 30, (200,), generator=generator)
    labels[::3] = -100
    counts = torch.randn(200, generator=generator, dtype=torch.float64)
    found = []
    for fn in (lambda h, w: (token_log_probs(h, w, labels) * counts).sum(),
               lambda h, w: -sum(plain_cross_entropy(h[i : i + 1], w, labels[i : i + 1]) * counts[i]
                                 for i in range(200) if labels[i] >= 0)):  # fmt: skip
        h, w = (t.clone().requires_grad_() for t in (hidden, head))
        value = fn(h, w)
        value.backward()
        found.append((value.detach(), h.grad, w.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_odds_of_a_sure_answer_stay_finite() -> None:
    logps = torch.tensor([[0.0, -3.0]], dtype=torch.float64, requires_grad=True)
    loss = pair_loss("orpo", BETA, logps, torch.ones(1, 2), None).loss.sum()
    loss.backward()
    assert torch.isfinite(loss) and logps.grad is not None and torch.isfinite(logps.grad).all()


def test_packed_pairs_are_each_pair_alone() -> None:
    """Another pair in the row, and the other answer of the same pair, change nothing: bit by bit."""
    pairs = drawn_pairs(3)
    model = tiny.model(VOCAB)
    alone = [score(model, [pair], 60)[0] for pair in pairs]
    torch.testing.assert_close(score(model, pairs, 200), torch.stack(alone), rtol=1e-5, atol=1e-5)
    other = [pairs[0], (pairs[1][0], pairs[2][1]), pairs[2]]
    others = [(pairs[0][0], (pairs[0][1][0][:-1] + [7], pairs[0][1][1])), *other[1:]]
    assert torch.equal(score(model, other, 200)[0], score(model, [pairs[0], pairs[1], pairs[2]], 200)[0])
    assert torch.equal(score(model, others, 200)[:, 0], score(model, other, 200)[:, 0])


def score(model: Transformer, pairs: list[tuple[Sequence, Sequence]], seq_len: int) -> Tensor:
    config = TrainConfig(seq_len=seq_len, batch_size=2)
    with torch.no_grad():
        return score_pairs(model, as_documents(pairs), sequence_log_probs, config, CPU)


# --- The reference -------------------------------------------------------------------------------------------------


def test_the_reference_is_made_without_dropout() -> None:
    model, pairs = tiny.model(VOCAB), as_documents(drawn_pairs())
    config = TrainConfig(seq_len=60, batch_size=1)
    wanted = make_reference(model, (pairs, pairs), sequence_log_probs, config, CPU, FP32)
    add_dropout_(model, 0.5)
    found = make_reference(model.train(), (pairs, pairs), sequence_log_probs, config, CPU, FP32)
    assert model.training
    assert torch.equal(found["train"], wanted["train"]) and torch.equal(found["hidden"], wanted["hidden"])
    torch.testing.assert_close(found["train"], reference_of(drawn_pairs()), rtol=1e-5, atol=1e-5)


def test_the_divergence_is_that_of_the_whole_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.loss.CHUNK_LOGITS", 1)
    generator = torch.Generator().manual_seed(0)
    mine, theirs, head = (torch.randn(n, 8, generator=generator) for n in (150, 150, 40))
    other = head + 0.1
    p, q = (F.log_softmax(h.double() @ w.double().T, dim=1) for h, w in ((mine, head), (theirs, other)))
    wanted = float(F.kl_div(q, p, log_target=True, reduction="sum"))
    assert summed_divergence(mine, head, theirs, other) == pytest.approx(wanted, rel=1e-5)
    assert summed_divergence(mine, head, mine, head) == 0


def test_another_model_has_another_digest() -> None:
    model = tiny.model(VOCAB)
    before = model_digest(model)
    assert before == model_digest(tiny.model(VOCAB))
    model.norm.weight.data[3] += 1e-6
    assert model_digest(model) != before


# --- Reading ---------------------------------------------------------------------------------------------------------

ASKED, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"question": "q", "chosen": "yes", "rejected": "no", "score_chosen": 4},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},  # axolotl's chat_template
        {"instruction": "q", "chosen_response": "yes", "rejected_response": "no"},  # Argilla's
        {"input": "q", "chosen": "yes", "rejected": "no"},
        {"instruction": "q", "input": "", "chosen": "yes", "rejected": "no"},  # LLaMA-Factory's
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {"prompt": "q", "messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},  # UltraFeedback
    ],
)
def test_a_pair_is_read_in_each_usual_shape(row: dict[str, Any], home: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = open_tokenizer(home / "t.model")
    pairs, _ = read_pairs(tmp_path / "pairs.jsonl", tokenizer, 128)
    judged = [tokenizer.decode(pairs.sequences.ids[a:b][pairs.sequences.said[a:b]].tolist()).strip()
              for a, b in ((0, pairs.sequences.starts[1]), pairs.sequences.starts[1:])]  # fmt: skip
    assert judged == ["yes", "no"]
    begins = [pairs.sequences.ids[a : a + 8].tolist() for a in pairs.sequences.starts[:2]]
    assert begins[0] == begins[1]


def test_an_instruction_and_its_input_are_one_prompt() -> None:
    sides, unread = as_pair({"instruction": "Say it.", "input": "Hallo", "chosen": "yes", "rejected": "no", "id": 7})
    assert [side["prompt"] for side in sides] == ["Say it.\n\nHallo"] * 2 and unread == ["id"]


def test_a_system_message_in_whole_dialogues_beside_their_prompt_stays_the_first() -> None:
    brief = {"role": "system", "content": "Be brief."}
    row = {"prompt": "q", "chosen": [brief, ASKED, GOOD], "rejected": [brief, ASKED, BAD]}
    assert [side["prompt"] for side in as_pair(row)[0]] == [[brief, ASKED]] * 2


def test_of_a_prompt_in_sharegpts_words_no_answer_is_judged() -> None:
    before = [{"from": f, "value": v} for f, v in (("human", "q"), ("gpt", "w"), ("human", "q"))]
    sides, _ = as_pair({"conversations": before, "chosen": {"from": "gpt", "value": "yes"},
                        "rejected": {"from": "gpt", "value": "no"}})  # fmt: skip
    assert as_dialogue(sides[0]).learned == [True, False, True, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "yes", "rejected": "no", "images": ["a.png"]}, '"images": pictures are not read'),
        ({"prompt": "q", "chosen": "yes"}, 'expected an object with "chosen" and "rejected"'),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "are the same: nothing to prefer"),
        ({"prompt": "q", "chosen": "yes", "rejected": [BAD]}, "are not alike"),
        ({"prompt": 3, "chosen": "yes", "rejected": "no"}, '"prompt" is int'),
        ({"chosen": "yes", "rejected": "no"}, 'there is no "prompt"'),
        ({"chosen": [GOOD], "rejected": [BAD]}, "do not begin with the same message"),
    ],
)
def test_what_is_no_pair_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_pair(row)


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs, and a base with its tokenizer."""
    folder, texts = tmp_path_factory.mktemp("preference"), stories(40)
    base(folder / "base", tokenizer(folder, texts), 160)
    rows = ({"prompt": f"say {i}", "chosen": f"yes {i} sir", "rejected": f"no way {i}"} for i in range(40))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(home: Path, out: Path, *flags: str) -> int | str | None:
    """The exit code of a run of 8 steps with dropout, in this process."""
    data = ["--data", str(home / "pairs.jsonl"), "--ckpt", str(home / "base"), "--cache", str(home / "cache")]
    small = "--seq_len 160 --batch_size 2 --max_steps 8 --eval_every 4 --lr 0.002 --dropout 0.1 --threads 1"
    argv = [*data, *small.split(), "--out", str(out), *flags]
    return exit_code(ENTRY, *argv)


METHODS = {"full": [], "lora": ["--method", "lora", "--lora_dropout", "0.1", "--lr", "0.02"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_prefers_what_it_was_shown_and_resumes_bit_by_bit(
    home: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "straight", *METHODS[method]) == 0
    said = capsys.readouterr().out
    assert "made once" in said and "held-out loss of a pair: " in said and "nats per token" not in said
    assert re.search(r"held-out pairs: margin .*, accuracy .*, kl 0.\d+ \(nats a token", said)
    page = (tmp_path / "straight" / "report.html").read_text()
    assert "loss of a pair" in page and "nats per token" in page  # of the divergence alone
    assert {"val_kl", "val_accuracy"} <= json.loads((tmp_path / "straight" / "summary.json").read_text()).keys()
    lines = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    checks = [line for line in lines if "val_loss" in line and line["step"] > 0]
    assert 0 < checks[0]["val_margin"] < checks[-1]["val_margin"]
    assert checks[-1]["val_accuracy"] == 1 and 0 < checks[0]["val_kl"] < checks[-1]["val_kl"]
    with stopped_at(3):
        assert run(home, tmp_path / "stopped", *METHODS[method]) == 128 + signal.SIGTERM
    assert "from the cache" in capsys.readouterr().out
    monkeypatch.setattr(reference_module, "make_reference", None)  # no second pass of the reference
    assert run(home, tmp_path / "stopped", *METHODS[method], "--resume") == 0
    losses = [[e["loss"] for e in read_metrics(tmp_path / o / "metrics.jsonl") if "loss" in e]
              for o in ("straight", "stopped")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 8
    weights = [open_checkpoint(tmp_path / o / "final").weights for o in ("straight", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_orpo_needs_no_reference(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, tmp_path / "out", "--loss", "orpo") == 0
    assert "reference:" not in capsys.readouterr().out
    check = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "val_loss" in line][-1]
    assert check["val_accuracy"] == 1 and "val_kl" not in check


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--doc_mask off", "--doc_mask off: the rejected answer would read the chosen one"),
        ("--loss kto", "--loss: expected one of dpo, ipo, dpo_norm, orpo"),
        ("--beta -1", "--beta -1.0: expected at least 0"),
        ("--seq_len 40", "do not fit --seq_len 40: raise it"),
        ("--data auto", "--data is missing"),
    ],
)
def test_unusable_flags_are_one_line(
    home: Path, tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(home, tmp_path / "out", *flags.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
