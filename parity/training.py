"""G8's stimulus, and how a candidate's training is run on it: seeded documents, one loss and its gradients, ten steps.

A document is [token ids, labels]: each label is the next token, the last one -100 (ignored), and in some documents
the first ones too, as a prompt's are. What must come out does not depend on how documents are laid out: a padded
batch, a packed row with a document mask, and any split into micro-batches give one loss and one set of gradients.

A candidate that trains has loss_and_grads(tokens, targets); one that can be asked for more has trainer(), an object
with any of the methods of `Trainer`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

IGNORED = -100
DTYPE = "fp32"  # in which training is judged: ten losses to five digits have no meaning in bf16
FILE = "training.safetensors"  # in a trace's folder: grad/NAME and others, see `record_training`
STEPS_FILE = "adamw.safetensors"  # the oracle's weights after made-up steps
BATCHES, MADE_STEPS = 10, 2
LENGTHS = (7, 23, 3, 12)  # of a batch's documents: unequal, so that a mean of means is wrong
PROMPT_LABELS = 4  # ignored at the start of each batch's second document
BOS, EOS = 1, 2  # ids that the documents begin and end with
# Powers of two and their sums: 1 - 0.9 in float32 is off by two ulp before a step has begun, 1 - 0.875 is exact.
HYPER = {"lr": 2.0**-13, "betas": [0.875, 0.96875], "eps": 2.0**-27, "weight_decay": 0.125}

Document = list[list[int]]  # token ids, labels
Grads = dict[str, Tensor]  # by Meta's weight names


class Trainer(Protocol):
    """What can be asked of a candidate beyond loss_and_grads; losses are means over the labels not ignored."""

    def packed(self, documents: list[Document]) -> tuple[Tensor, Grads]: ...  # all in one row
    def accumulated(self, parts: list[list[Document]]) -> tuple[Tensor, Grads]: ...  # micro-batches of one step
    def labels(self, documents: list[list[int]]) -> list[list[int]]: ...  # made by its own data path; one row packed
    def adamw(self, steps: list[Callable[[Tensor], Tensor]], hyper: dict) -> list[Grads]: ...  # weights after each
    def losses(self, batches: list[list[Document]], hyper: dict) -> list[float]: ...  # before each batch's step
    def merged(self, tokens: Tensor) -> tuple[Tensor, Tensor]: ...  # logits with an adapter beside, and merged in


def training_case(vocab_size: int, seed: int = 0) -> dict[str, Any]:
    """Batches of seeded documents and AdamW's numbers, JSON-ready."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(BATCHES):
        drawn = [torch.randint(3, vocab_size, (n - 2,), generator=generator).tolist() for n in LENGTHS]
        batches.append([document([BOS, *ids, EOS], PROMPT_LABELS if i == 1 else 0) for i, ids in enumerate(drawn)])
    return {"batches": batches, **HYPER}


def document(tokens: list[int], prompt_labels: int) -> Document:
    labels = [*tokens[1:], IGNORED]
    return [tokens, [IGNORED] * prompt_labels + labels[prompt_labels:]]


def padded(documents: list[Document]) -> tuple[Tensor, Tensor]:
    """tokens, targets (B, T): a document a row, its padding ignored. Causal attention never sees the padding."""
    width = max(len(tokens) for tokens, _ in documents)
    tokens = [ids + [0] * (width - len(ids)) for ids, _ in documents]
    targets = [labels + [IGNORED] * (width - len(labels)) for _, labels in documents]
    return torch.tensor(tokens), torch.tensor(targets)


def splits(documents: list[Document]) -> dict[str, list[list[Document]]]:
    """Ways to cut a batch into micro-batches; the last one's window is not full."""
    return {"1 x 4": [documents], "4 x 1": [[d] for d in documents], "3 + 1": [documents[:3], documents[3:]]}


def made_up_gradient(weight: Tensor, step: int) -> Tensor:
    """float32 numbers in +-0.0005 that any process makes alike from a weight: a product and its fraction."""
    return (torch.frac(weight.detach().float() * (8191.0 * (step + 1))) - 0.5) * 1e-3


def record_training(candidate: Any, training: dict[str, Any], prompt: list[int], folder: Path) -> dict[str, Any]:
    """Run what the candidate can, write its tensors into `folder`; returns what belongs into trace.json.

    prompt: token ids of a sequence whose logits the references recorded.
    """
    started, first, tensors = time.perf_counter(), training["batches"][0], dict[str, Tensor]()
    meta: dict[str, Any] = {"by": {}, "uncovered": {}}
    trainer: Any = candidate.trainer() if callable(getattr(candidate, "trainer", None)) else None

    def ask(target: Any, method: str, *args: Any) -> Any:
        """The method's answer; None where there is no such method, or it says that it cannot."""
        try:
            return getattr(target, method)(*args) if callable(getattr(target, method, None)) else None
        except NotImplementedError as error:
            meta["uncovered"][method] = str(error) or f"the candidate's {method}() cannot do it"
            return None

    def keep(prefix: str, found: tuple[Tensor, Grads] | None, into: dict[str, float], name: str) -> None:
        if found is not None:
            into[name] = float(found[0])
            tensors.update({f"{prefix}/{n}": g for n, g in found[1].items()})

    keep("grad", ask(candidate, "loss_and_grads", *padded(first)), meta, "loss")
    keep("packed", ask(trainer, "packed", first), meta["by"], "packed")
    for name, parts in splits(first).items():
        keep(name, ask(trainer, "accumulated", parts), meta["by"], name)
    makers = [lambda w, n=n: made_up_gradient(w, n) for n in range(MADE_STEPS)]
    for n, weights in enumerate(ask(trainer, "adamw", makers, training) or [], 1):
        tensors |= {f"adamw/{n}/{name}": w for name, w in weights.items() if is_stepped(name, w)}
    for name, args in {"labels": [[ids for ids, _ in first]], "losses": [training["batches"], training]}.items():
        if (answer := ask(trainer, name, *args)) is not None:
            meta[name] = answer
    if (logits := ask(trainer, "merged", torch.tensor([prompt]))) is not None:
        tensors["merged/beside"], tensors["merged/in"] = logits
    save_file({k: t.detach().float().contiguous().clone() for k, t in tensors.items()}, folder / FILE)
    return meta | {"seconds": time.perf_counter() - started}


def is_stepped(name: str, weight: Tensor) -> bool:
    """The weights whose made-up steps the oracle wrote down."""
    return weight.ndim == 1 or name.startswith("layers.0.")


def read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    with safe_open(path, "pt") as file:
        return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
