"""A made-up model with every method of the interface, evidence that judges it, and hostile answers to each question.

Each token has a fixed row in a table for each tap, so that any batch, prefix, cache or packed row is a look-up: the
right candidate passes every gate within milliseconds, and any answer of it can be spoiled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from parity.checks import CHECKS, verdict
from parity.contract import Case, Result
from parity.measure.evidence import Evidence
from parity.run.run_candidate import record
from parity.run.training import FILE, MADE_STEPS, STEPS_FILE, training_case
from parity.trace import Trace, TraceWriter, by_part
from reference.protocol import tap_names

VOCAB, WIDTH, NEW, POSITIONS = 13, 8, 3, [0, 1, 5]
CONFIG = {"n_layers": 1, "norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "head_dim": 8, "vocab_size": VOCAB}
WEIGHTS = {"norm.weight": {"shape": [WIDTH], "crc32": 7}}
IDS, PLAIN, DIALOG = [1, 2, 3], [2, 3], [4, 5, 6]
GENERATOR = torch.Generator().manual_seed(0)
TABLES = {t: torch.randn(VOCAB, VOCAB if t == "logits" else WIDTH, generator=GENERATOR).double() for t in tap_names(1)}
TABLES["logits"][torch.arange(VOCAB), torch.randperm(VOCAB, generator=GENERATOR)] += 9  # a clear next token
ANGLES = torch.outer(torch.tensor(POSITIONS).float(), 1e4 ** (-torch.arange(0, 8, 2).float() / 8))
GRADIENT = torch.randn(WIDTH, generator=GENERATOR).double()
TRAINING = training_case(VOCAB)
LOSSES = [2.0 - 0.1 * n for n in range(len(TRAINING["batches"]))]


def _sequence(length: int) -> list[int]:
    ids = torch.randint(VOCAB, (length,), generator=GENERATOR).tolist()
    for _ in range(NEW):
        ids.append(int(TABLES["logits"][ids[-1]].argmax()))
    return ids


SEQUENCES = [_sequence(70), _sequence(131)]


def rounded(x: Tensor, seed: int) -> Tensor:
    """What a correct implementation has: errors of a rounding's size."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
    return (x * (1 + 1e-7 * noise)).float()


def _write(folder: Path, tables: dict[str, Tensor], seed: int) -> Trace:
    writer = TraceWriter(folder)
    found = {f"{i}/{tap}": table[torch.tensor(ids)] for i, ids in enumerate(SEQUENCES) for tap, table in tables.items()}
    for dtype in ("fp32", "bf16"):
        for part, tensors in by_part(found):
            writer.part(dtype, part, tensors)
    writer.rope(ANGLES.cos(), ANGLES.sin())
    gradient = {f"{kind}/norm.weight": rounded(GRADIENT, seed) for kind in ("grad", "padded")} if seed else {}
    gradient = gradient or {"grad/norm.weight": GRADIENT}
    nats = torch.ones(9).double() if not seed else rounded(torch.ones(9).double(), seed)
    save_file(gradient | {"nats": nats}, folder / FILE)
    save_file({f"{n}/norm.weight": GRADIENT * n for n in range(1, MADE_STEPS + 1)}, folder / STEPS_FILE)
    meta = {"sequences": SEQUENCES, "prompt_lengths": [len(s) - NEW for s in SEQUENCES], "config": CONFIG}
    meta |= {"dtypes": {"fp32": "fp32", "bf16": "bf16"}, "weights": WEIGHTS, "training": {"losses": LOSSES}}
    meta |= {"token_ids": [IDS], "corpus_ids": [PLAIN], "dialog_ids": [DIALOG], "positions": None}
    writer.finish(meta | {"seconds_forward": 0.0})
    return Trace(folder)


def case_of(dtypes: list[str]) -> Case:
    lengths = [len(s) - NEW for s in SEQUENCES]
    return Case(
        "-", dtypes, prompts=SEQUENCES, prompt_lengths=lengths, texts=["a"], corpus=["b"], dialogs=[[]], tokenizer="-",
        rope_positions=POSITIONS, weights=True, training=TRAINING, vocab_size=VOCAB,
    )  # fmt: skip


class Model:
    """Right in everything."""

    def __init__(self, checkpoint: str = "-", dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.tables = {tap: rounded(table, 2) for tap, table in TABLES.items()}

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.tables["logits"][tokens]

    def taps(self, tokens: Tensor) -> dict[str, Tensor]:
        return {tap: table[tokens] for tap, table in self.tables.items() if tap != "logits"}

    def ops(self, name: str, inputs: dict[str, Tensor]) -> Tensor:
        length = next(iter(inputs.values())).shape[1]
        ids = next(ids for ids in SEQUENCES if len(ids) == length)
        return self.tables[name][torch.tensor([ids])]

    def prefill(self, tokens: Tensor) -> Tensor:
        return self(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self(tokens)[:, -1:]

    def packed(self, tokens: Tensor, doc_ids: Tensor) -> Tensor:
        return self(tokens)

    def compiled(self, tokens: Tensor) -> Tensor:
        return self(tokens)

    def encode(self, text: str) -> list[int]:
        return IDS

    def encode_plain(self, text: str) -> list[int]:
        return PLAIN

    def encode_chat(self, dialog: list[dict[str, Any]]) -> list[int]:
        return DIALOG

    def config(self) -> dict[str, Any]:
        return dict(CONFIG)

    def weights(self) -> dict[str, Any]:
        return {name: dict(entry) for name, entry in WEIGHTS.items()}

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return ANGLES.cos(), ANGLES.sin()

    def loss_and_grads(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(LOSSES[0]), {"norm.weight": rounded(GRADIENT, 3)}

    def trainer(self) -> "Trainer":
        return Trainer(self)


class Trainer:
    def __init__(self, model: Model) -> None:
        self.model = model

    def packed(self, documents: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return Model.loss_and_grads(self.model, GRADIENT, GRADIENT)

    def accumulated(self, parts: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return Model.loss_and_grads(self.model, GRADIENT, GRADIENT)

    def labels(self, documents: list[list[int]]) -> list[list[int]]:
        return [[*ids[1:], -100] for ids in documents]

    def adamw(self, makers: list[Any], hyper: dict[str, Any]) -> list[dict[str, Tensor]]:
        return [{"norm.weight": (GRADIENT * n).float()} for n in range(1, MADE_STEPS + 1)]

    def losses(self, batches: list[Any], hyper: dict[str, Any]) -> list[float]:
        return list(LOSSES)

    def merged(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.tables["logits"][tokens], rounded(TABLES["logits"], 4)[tokens]


class Server:
    """Tokens alone."""

    def __init__(self, checkpoint: str = "-", dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        pass

    def next_tokens(self, ids: list[int], n: int) -> list[int]:
        new = list(ids)
        for _ in range(n):
            new.append(int(TABLES["logits"][new[-1]].argmax()))
        return new[len(ids) :]


def judge(load: Any, folder: Path, dtypes: tuple[str, ...] = ("fp32",)) -> tuple[list[Result], str]:
    """Results of every check, and the verdict."""
    oracle = _write(folder / "oracle", TABLES, 0)
    reference = _write(folder / "reference", {t: rounded(x, 1) for t, x in TABLES.items()}, 1)
    case = case_of(list(dtypes))
    forced = {"meta": reference}
    record(load, case, TraceWriter(folder / "candidate"), lambda stage, done: None, forced)
    candidates: dict[str | None, Trace] = {None: Trace(folder / "candidate")}
    ev = Evidence(case, oracle, forced, candidates, forced=forced, ops={"meta": oracle})
    ev.measure_all(1, list(dtypes))
    results = verdict.run_checks(ev, list(CHECKS))
    return results, verdict.decide(results, verdict.common_dtypes(ev), verdict.compared_tensors(ev))[0]


# --- Hostile answers -------------------------------------------------------------------------------------------------


class Boom(RuntimeError):
    pass


def _tensor(kind: str, x: Tensor) -> Any:
    x = x.reshape(1) if kind in ("empty", "too wide", "too narrow") and not x.dim() else x
    if kind == "one number off":  # in each row
        out = x.clone()
        out.view(-1, *x.shape[-1:])[:, :1] += 1
        return out
    return {
        "NaN": lambda: torch.full_like(x, torch.nan), "inf": lambda: torch.full_like(x, torch.inf),
        "empty": lambda: x[..., :0], "wrong shape": lambda: x.unsqueeze(0),
        "wrong dtype": lambda: x.to(torch.complex64),
        "too wide": lambda: torch.cat((x, x[..., :1]), -1),
        "too narrow": lambda: x[..., :-1],
    }[kind]()  # fmt: skip


def _number(kind: str, x: float) -> Any:
    return {
        "NaN": float("nan"), "inf": float("inf"), "empty": [], "wrong shape": [[x]], "wrong dtype": f"{x} or so",
        "too wide": x + 1, "too narrow": x - 1, "one number off": x + 1,
    }[kind]  # fmt: skip


def spoil(kind: str, value: Any) -> Any:
    """A right answer turned into a hostile one of the same making."""
    if isinstance(value, Tensor):
        return _tensor(kind, value)
    if isinstance(value, dict):
        return {} if kind == "empty" else {name: spoil(kind, entry) for name, entry in value.items()}
    if isinstance(value, tuple) and kind == "one number off":
        return spoil(kind, value[0]), *value[1:]
    if isinstance(value, tuple):
        return tuple(spoil(kind, entry) for entry in value)
    if isinstance(value, list):
        if kind in ("empty", "too wide", "too narrow"):
            return {"empty": [], "too wide": value + value[-1:], "too narrow": value[:-1]}[kind]
        if kind == "wrong shape":
            return [value]
        if kind == "one number off":
            return [spoil(kind, value[0]), *value[1:]]
        return [spoil(kind, entry) for entry in value]
    return value if value is None or isinstance(value, str) else _number(kind, value)


ANSWERS = ("NaN", "inf", "empty", "wrong shape", "wrong dtype", "too wide", "too narrow", "None", "raises",
           "raises at the second call", "one number off")  # fmt: skip


def spoiled(kind: str, right: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def answer(*args: Any) -> Any:
        calls[0] += 1
        if kind == "raises" or (kind == "raises at the second call" and calls[0] == 2):
            raise Boom("out of registers\nand a second line")
        if kind == "None" or kind == "raises at the second call":
            return None if kind == "None" else right(*args)
        return spoil(kind, right(*args))

    answer.calls = calls  # type: ignore[attr-defined]
    return answer


class Called(Model):
    """A model whose forward pass is an attribute, so that it can be spoiled as well."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.forward: Callable[..., Any] = super().__call__

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.forward(tokens)
