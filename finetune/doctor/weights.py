"""Ills of the model: a loss that is not where it should be, numbers that overflow, gradients that do not arrive, a
tied head that is not.

Each check takes a Patient and yields Findings; a healthy model yields none.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.documents import IGNORE, Ints
from finetune.doctor.patient import Finding, Patient, unchanged

FROM_SCRATCH = 1.0  # nats that an untrained model's first loss may be away from that of knowing nothing
ABOVE_UNIGRAM = 0.5  # nats: a model that was trained on other text may be a little worse than counting this one
NAMED = 3


def check_first_loss(patient: Patient) -> Iterator[Finding]:
    """A loaded model knows more than how frequent the tokens are; an untrained one knows nothing."""
    batch = patient.part()
    if not batch.valid:
        return
    with torch.no_grad():
        loss = float(patient.nats(batch))
    if not math.isfinite(loss):
        yield _overflow(patient)
        return
    rows = patient.model.config.vocab_size
    nothing, counted = math.log(rows), unigram(patient, batch.labels)
    known = f"knowing nothing costs {nothing:.2f}, counting the data's tokens {counted:.2f}"
    patient.facts.append(f"loss before the first step: {loss:.2f} nats a token; {known}")
    if patient.config.ckpt and loss > min(nothing, counted + ABOVE_UNIGRAM):
        yield Finding(
            "wrong tokenizer",
            f"the loaded model's loss is {loss:.2f} nats a token, and {known}: the tokenizer is not the one that the "
            "model was trained with, or its weights are untrained; name its own --tokenizer",
        )
    if not patient.config.ckpt and abs(loss - nothing) > FROM_SCRATCH:
        yield Finding(
            "first loss",
            f"an untrained model's loss is {loss:.2f} nats a token, and {known}: fresh weights are too large, or the "
            "labels are not the text",
        )


def unigram(patient: Patient, labels: Tensor) -> float:
    """Mean nats of these labels by the frequencies of the data's tokens, each counted once more than it was seen; not
    less than those of all tokens, since answers that are much the same (one word, a refusal) are cheap to count.
    """
    rows = patient.model.config.vocab_size
    learned: list[Ints] = [ids[mask] for ids, mask in patient.documents]
    everything = np.concatenate([ids for ids, _ in patient.documents])
    picked = labels[labels != IGNORE].cpu().numpy()
    return max(_counted(np.concatenate(learned), picked, rows), _counted(everything, everything, rows))


def _counted(seen: Ints, picked: Ints, rows: int) -> float:
    counts = np.bincount(seen, minlength=rows)[:rows] + 1
    return float(-np.log(counts[picked] / counts.sum()).mean())


def check_largest_length(patient: Patient) -> Iterator[Finding]:
    """All numbers are finite on a whole row."""
    with torch.no_grad():
        if patient.batch.valid and not math.isfinite(float(patient.loss(patient.batch))):
            yield _overflow(patient)


class Extent(NamedTuple):
    """What came out of one module."""

    name: str
    finite: bool
    largest: float  # absolute value


def _overflow(patient: Patient) -> Finding:
    """Where numbers leave the dtype of the computation, and how large they are in fp32."""
    dtype = patient.autocast.fast_dtype if _is_on(patient.autocast) else torch.float32
    here = next((extent for extent in _extents(patient, patient.autocast) if not extent.finite), None)
    exact = _extents(patient, torch.autocast(patient.device.type, enabled=False))
    name = here.name if here else "the loss"
    there = next((extent for extent in exact if extent.name == name), None)
    short = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
    if there is None or not there.finite:
        what = "its weights or its input hold NaN or infinity: look at the checkpoint"
    else:
        limit = torch.finfo(dtype).max
        what = f"the numbers reach {there.largest:.3g}, and {short} ends at {limit:.3g}: compute in bf16 or fp32"
    return Finding("overflow", f"the loss is not finite on a row of {patient.config.seq_len} tokens: {name}: {what}")


def _is_on(autocast: torch.autocast) -> bool:
    return bool(autocast._enabled)


def _extents(patient: Patient, autocast: torch.autocast) -> list[Extent]:
    """Of each module's output, in the order in which they are computed."""
    found: list[Extent] = []

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                finite = bool(output.isfinite().all())
                found.append(Extent(name, finite, float(output.abs().max()) if finite else math.inf))

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in patient.model.named_modules() if name]
    try:
        with torch.no_grad():
            patient.loss(patient.batch, autocast)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def check_tied_head(patient: Patient) -> Iterator[Finding]:
    """A head that is the embedding is one parameter with it."""
    model = patient.model
    table = model.tok_embeddings.weight  # with chat rows apart it is made anew whenever it is read
    if model.config.tied and isinstance(table, nn.Parameter) and model.head().data_ptr() != table.data_ptr():
        yield Finding(
            "tied head broken",
            "the config says that the head is the embedding, and it is a copy: the two would drift apart and one of "
            "them be lost in final/; use the embedding's own weight",
        )


def check_gradients(patient: Patient) -> Iterator[Finding]:
    """All that the method trains has a gradient that is finite and not all zero."""
    if not patient.batch.valid:
        return
    model = patient.model
    with unchanged(patient):
        loss = patient.nats(patient.part())
        if not loss.requires_grad:
            yield Finding("frozen head", "nothing is trained: no parameter has a gradient")
            return
        if not math.isfinite(float(loss.detach())):
            return  # named by the first loss
        loss.backward()
        names = [name for name, p in model.named_parameters() if patient.is_trained(name) and _is_dead(name, p)]
    if model.config.tied and "tok_embeddings.weight" not in names and patient.is_trained("tok_embeddings.weight"):
        names += ["the head (tied to tok_embeddings)"] if not _head_learns(patient) else []
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        trained = sum(patient.is_trained(name) for name, _ in model.named_parameters())
        yield Finding(
            "frozen head" if any("output" in n or "head" in n or "tok_emb" in n for n in names) else "frozen tensors",
            f"no gradient reaches {', '.join(names[:NAMED])}{more} of the {trained} tensors that --method "
            f"{patient.config.method} trains: they are frozen or detached",
        )


def _is_dead(name: str, parameter: nn.Parameter) -> bool:
    if not parameter.requires_grad or parameter.grad is None:
        return True
    # Its partner is zero at first, so that an adapter begins as no change: A has no gradient yet.
    return not name.endswith(".lora_A") and not bool(parameter.grad.any())


def _head_learns(patient: Patient) -> bool:
    """Whether a head that is the embedding has gradients as the head: of a token that stands nowhere in the row."""
    batch = patient.part()
    absent = torch.ones(patient.model.config.vocab_size, dtype=torch.bool, device=batch.tokens.device)
    absent[batch.tokens.flatten()] = False
    if not absent.any():
        return True
    with unchanged(patient):
        patient.nats(batch).backward()
        grad = patient.model.tok_embeddings.weight.grad
        return grad is not None and bool(grad[absent].any())
