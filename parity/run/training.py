"""G8's stimulus, and how a candidate's training is run on it: seeded documents, one loss and its gradients, ten steps.

A document is [token ids, labels]: each label is the next token, the last one -100 (ignored), and in some documents
the first ones too, as a prompt's are. What must come out does not depend on how documents are laid out: a padded
batch, a packed row with a document mask, and any split into micro-batches give one loss and one set of gradients.

A candidate that trains has loss_and_grads(tokens, targets); one that can be asked for more has trainer(), an object
with any of the methods of interface.TRAINER.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from parity.candidates import answers
from parity.candidates.interface import TRAINER, Interface
from parity.contract import Case
from parity.run.recording import Recording

IGNORED = -100
DTYPE = "fp32"  # in which training is judged: ten losses to five digits have no meaning in bf16
FILE = "training.safetensors"  # in a trace's folder: grad/NAME and others, see `record_training`
STEPS_FILE = "adamw.safetensors"  # the oracle's weights after made-up steps
OBJECTIVES = ("preferences", "distillation", "adapters")  # each of several kinds, beside the plain loss
OBJECTIVE_FILE = "{}.safetensors"  # of references and oracle: KIND/grad/NAME, KIND/padded/NAME
BATCHES, MADE_STEPS = 10, 2
LENGTHS = (7, 23, 3, 12)  # of a batch's documents: unequal, so that a mean of means is wrong
PROMPT_LABELS = 4  # ignored at the start of each batch's second document
PAIR_LENGTHS = ((5, (9, 3)), (2, (4, 13)), (8, (1, 6)))  # tokens of prompts and of their two answers: unequal too
BETA, KINDS = 0.25, ("dpo", "orpo")  # a sum of log-probabilities with a reference; a mean of them without one
# A teacher that is followed at the labels, or everywhere; with the labels' own loss beside it.
DISTILLATION = {"temperature": 2.0, "mix": 0.75, "kinds": ["labels", "all"]}
# Without q and k, whose rows have another order in other layouts.
ADAPTERS = {"targets": ["wv.weight", "wo.weight", "w1.weight", "w2.weight", "w3.weight"], "rank": 4, "alpha": 8.0}
ADAPTER_KINDS = ["lora", "dora"]
BOS, EOS = 1, 2  # ids that the documents begin and end with
# Powers of two and their sums: 1 - 0.9 in float32 is off by two ulp before a step has begun, 1 - 0.875 is exact.
HYPER = {"lr": 2.0**-13, "betas": [0.875, 0.96875], "eps": 2.0**-27, "weight_decay": 0.125}

Document = list[list[int]]  # token ids, labels
Grads = dict[str, Tensor]  # by Meta's weight names


def training_case(vocab_size: int, seed: int = 0) -> dict[str, Any]:
    """Batches of seeded documents and AdamW's numbers, JSON-ready."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(BATCHES):
        drawn = [torch.randint(3, vocab_size, (n - 2,), generator=generator).tolist() for n in LENGTHS]
        batches.append([document([BOS, *ids, EOS], PROMPT_LABELS if i == 1 else 0) for i, ids in enumerate(drawn)])
    objectives = {"preferences": preference_case(vocab_size, generator), "distillation": DISTILLATION}
    return {"batches": batches, **objectives, "adapters": {**ADAPTERS, "kinds": ADAPTER_KINDS}, **HYPER}


def preference_case(vocab_size: int, generator: torch.Generator) -> dict[str, Any]:
    """Pairs of a chosen and a rejected document with one prompt, whose labels are ignored; JSON-ready."""
    pairs = []
    for prompt_tokens, counts in PAIR_LENGTHS:
        prompt = [BOS, *torch.randint(3, vocab_size, (prompt_tokens - 1,), generator=generator).tolist()]
        drawn = [torch.randint(3, vocab_size, (n - 1,), generator=generator).tolist() for n in counts]
        pairs.append([document([*prompt, *ids, EOS], prompt_tokens - 1) for ids in drawn])
    return {"pairs": pairs, "beta": BETA, "kinds": list(KINDS)}


def pushed(weight: Tensor) -> Tensor:
    """Moved by float32 numbers in +-0.008 that any process makes alike from a weight: a product and its fraction."""
    narrow = weight.detach().float()
    return (narrow + (torch.frac(narrow * 8191.0) - 0.5) * 2.0**-6).to(weight.dtype)


def made_up_adapter(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """Float32 numbers that any process makes alike from a weight (outputs, inputs): products and their fractions."""
    narrow = weight.detach().float()
    return {
        "lora_A": (torch.frac(narrow[:rank] * 8191.0) - 0.5) * 2.0**-3,  # (rank, inputs)
        "lora_B": (torch.frac(narrow[:, :rank] * 4093.0) - 0.5) * 2.0**-4,  # (outputs, rank)
        "lora_magnitude": 1 + torch.frac(narrow[:, 0] * 2039.0) / 2,  # (outputs,)
    }


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


def record_training(candidate: Interface, case: Case, folder: Path, out: Recording) -> dict[str, Any]:
    """Run what the candidate can, write its tensors into `folder`; returns what belongs into trace.json.

    What goes wrong is left in `out`; a method that gave nothing is `uncovered`, with the reason.
    """
    assert case.training is not None and case.prompts is not None
    training, started, tensors = case.training, time.perf_counter(), dict[str, Tensor]()
    first, prompt = training["batches"][0], torch.tensor([case.prompts[0]])
    asks = Trains(candidate, out)
    meta: dict[str, Any] = {"by": {}, **{name: {} for name in OBJECTIVES}, "uncovered": asks.uncovered}

    def keep(prefix: str, found: tuple[float, Grads] | None, into: dict[str, float], name: str) -> None:
        if found is not None:
            into[name] = found[0]
            tensors.update({f"{prefix}/{n}": g for n, g in found[1].items()})

    keep("grad", asks("loss_and_grads", answers.loss_and_grads, *padded(first)), meta, "loss")
    keep("packed", asks("packed", answers.loss_and_grads, first), meta["by"], "packed")
    for name, parts in splits(first).items():
        keep(name, asks("accumulated", answers.loss_and_grads, parts), meta["by"], name)
    pairs = training["preferences"]
    for kind in pairs["kinds"]:
        found = asks("preferences", answers.loss_and_grads, pairs["pairs"], pushed, kind, pairs["beta"])
        keep(f"preferences/{kind}", found, meta["preferences"], kind)
    taught, two = training["distillation"], splits(first)["3 + 1"]
    for kind in taught["kinds"]:
        asked = (two, pushed, taught["temperature"], taught["mix"], kind)
        keep(f"distillation/{kind}", asks("distillation", answers.loss_and_grads, *asked), meta["distillation"], kind)
    worn = training["adapters"]
    for kind in worn["kinds"]:
        wear = (two, made_up_adapter, worn["targets"], worn["rank"], worn["alpha"], kind)
        keep(f"adapters/{kind}", asks("adapters", answers.loss_and_grads, *wear), meta["adapters"], kind)
    makers = [lambda w, n=n: made_up_gradient(w, n) for n in range(MADE_STEPS)]
    steps = asks("adamw", lambda o, asked: answers.steps(o, asked, MADE_STEPS), makers, training)
    for n, weights in enumerate(steps or [], 1):
        tensors |= {f"adamw/{n}/{name}": w for name, w in weights.items() if is_stepped(name, w)}
    rows = lambda o, asked: answers.each(o, asked, "label rows", answers.label_row)
    losses = lambda o, asked: answers.each(o, asked, "losses", answers.number)
    for name, read_, args in (("labels", rows, [[ids for ids, _ in first]]), ("losses", losses,
                              [training["batches"], training])):  # fmt: skip
        if (answer := asks(name, read_, *args)) is not None:
            meta[name] = answer
    both = lambda o, asked: answers.two_logits(o, asked, prompt.shape[1], case.vocab_size)
    if (logits := asks("merged", both, prompt)) is not None:
        tensors["merged/beside"], tensors["merged/in"] = logits
    save_file({k: t.detach().float().cpu().contiguous().clone() for k, t in tensors.items()}, folder / FILE)
    return meta | {"seconds": time.perf_counter() - started}


class Trains:
    """Asks a candidate, or its trainer, for one thing after another."""

    def __init__(self, candidate: Interface, out: Recording) -> None:
        self.out, self.uncovered = out, dict[str, str]()
        self.candidate, self.trainer = candidate, Interface(None, TRAINER)
        with self.step("trainer", "trainer()"):
            if "trainer" in candidate.has:
                self.trainer = Interface(candidate.ask("trainer"), TRAINER, candidate.file, candidate.note)

    @contextmanager
    def step(self, method: str, metric: str) -> Iterator[None]:
        kind = f"training {method}"
        with self.out.step(kind, "training", "G8", metric):
            yield
        if kind in self.out.uncovered:
            self.uncovered[method] = self.out.uncovered.pop(kind)

    def __call__(self, method: str, read: Callable[[Any, str], Any], *args: Any) -> Any:
        """The answer as `read` returns it; None where there is none."""
        owner = self.candidate if method == "loss_and_grads" else self.trainer
        if method not in owner.has:
            self.uncovered[method] = self.uncovered.get("trainer", owner.lacks(method))
            return None
        row, answer = owner.row(method), list[Any]()
        with self.step(method, row.metric or "gradient"):
            answer.append(read(owner.ask(method, *args), row.signature))
        return answer[0] if answer else None


def is_stepped(name: str, weight: Tensor) -> bool:
    """The weights whose made-up steps the oracle wrote down."""
    return weight.ndim == 1 or name.startswith("layers.0.")


def read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    with safe_open(path, "pt") as file:
        return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
