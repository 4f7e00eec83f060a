"""The candidate interface as one table: what a candidate may have, what it returns, and which check it feeds.

The harness asks through `Interface`, which looks the table up; docs/parity.md's tables are printed from it, and what a
report says about a missing method stands in it. To add a method, add a row, and ask for it where its like is asked:
config, weights, RoPE and ids in parity/run/run_candidate.py, logits and taps in a driver (whole.py, streamed.py,
tokens.py), operations in teacher_forcing.py, training in training.py. docs/architecture.md says what else.

    python -m parity.candidates.interface        # prints: | method | check | returns | ...
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from parity import outside
from parity.candidates.conditions import Conditions
from parity.candidates.crash import Crashed, Wrong
from parity.contract import DTYPES, UsageError
from parity.outside import kind_of


@dataclass(frozen=True)
class Method:
    """One row. `takes`: its positional parameters; more with defaults do not matter."""

    name: str
    takes: tuple[str, ...]
    returns: str
    check: str
    gate: str
    of: Literal["candidate", "trainer"] = "candidate"
    metric: str | None = None  # of the check, where the method feeds that one alone
    lacking: str | None = None  # what the report says where it is missing, if that is not "the candidate has no NAME()"

    @property
    def signature(self) -> str:
        return f"{'model' if self.name == '__call__' else self.name}({', '.join(self.takes)})"

    @property
    def why_missing(self) -> str:
        owner = "the candidate" if self.of == "candidate" else "the candidate's trainer()"
        return self.lacking or f"{owner} has no {self.name}()"


@dataclass(frozen=True)
class Attribute:
    """What a candidate declares about itself; `fits` says whether a value of that name is meant so."""

    name: str
    meaning: str
    values: str
    fits: Callable[[Any], bool]
    default: Any = None


NO_CACHE = "the candidate has no prefill() and decode()"
METHODS: tuple[Method, ...] = (
    Method("__call__", ("tokens",), "logits `(B, T, V)`, a Tensor or array of any float dtype, or an object with a"
           " field `logits`", "logits", "G3", lacking="the candidate cannot be called: it has no logits"),
    Method("next_tokens", ("ids", "n"), "the `n` greedy tokens after the list `ids`, in place of logits", "argmax",
           "G6"),
    Method("log_probs", ("ids", "positions"), "`{position: {id: log-probability of it as the next token}}`, of any ids,"
           " at `positions` or more, beside `next_tokens`", "logits", "G3",
           lacking="the candidate lists no log-probabilities"),
    Method("taps", ("tokens",), "`{tap name: (B, T, ...)}`, any subset of the names below", "taps", "G3"),
    Method("ops", ("name", "inputs"), "the tap `name`, `(B, T, ...)`, computed from `inputs` alone", "ops", "G2"),
    Method("prefill", ("tokens",), "logits of these tokens, `(B, n, V)`, or of the last, `(B, 1, V)` or `(B, V)`",
           "cache", "G7", lacking=NO_CACHE),
    Method("decode", ("tokens",), "the same, of the tokens that follow", "cache", "G7", lacking=NO_CACHE),
    Method("packed", ("tokens", "doc_ids"), "logits where tokens see earlier ones of their own document only",
           "metamorphic", "G7", lacking="the candidate has no packed(tokens, doc_ids)"),
    Method("compiled", ("tokens",), "logits of the compiled model", "metamorphic", "G7",
           lacking="the candidate has no compiled(tokens)"),
    Method("encode", ("text",), "ids with BOS", "tokens", "G0"),
    Method("encode_plain", ("text",), "ids without BOS", "tokens", "G0"),
    Method("encode_chat", ("dialog",), "ids of a dialog `[{\"role\", \"content\"}]`, ready for the assistant's answer,"
           " or None", "chat", "G0"),
    Method("use_tokenizer", ("path",), "nothing: from now on ids are by that file, where the user named one", "tokens",
           "G0"),
    Method("config", (), "the config echo (below)", "config", "G0"),
    Method("weights", (), "`{Meta name: {\"shape\", \"crc32\"}}` of the stored bytes in Meta's layout", "weights",
           "G0"),
    Method("rope", ("positions",), "float32 `cos`, `sin`, `(N, head_dim/2)` each", "rope", "G1"),
    Method("stream", ("sequences", "positions"), "an iterator of `(part, {\"sequence/tap\": (T, ...)})`, layer by"
           " layer, for models larger than memory", "logits", "G3"),
    Method("loss_and_grads", ("tokens", "targets"), "mean loss, `{Meta name: gradient}`", "training", "G8"),
    Method("trainer", (), "an object with any of the methods below", "training", "G8"),
)  # fmt: skip
TRAINER: tuple[Method, ...] = tuple(
    Method(name, takes, returns, "training", "G8", "trainer", metric)
    for name, takes, metric, returns in (
        ("packed", ("documents",), "document mask", "loss and gradients of all documents `[ids, labels]` packed in one"
         " row"),
        ("accumulated", ("parts",), "accumulation", "loss and gradients of one step over unequal micro-batches, the"
         " last window not full"),
        ("labels", ("documents",), "target mask", "each document's labels, as its own data path makes them from ids"),
        ("preferences", ("pairs", "push", "kind", "beta"), "preferences", "loss and gradients of the weights"
         " `push(weight)` over pairs of a chosen and a rejected document; the weights as loaded are the reference; kind"
         " is dpo or orpo"),
        ("distillation", ("parts", "push", "temperature", "mix", "kind"), "distillation", "loss and gradients of the"
         " weights `push(weight)` over micro-batches of documents; the weights as loaded are the teacher, at a"
         " temperature; kind is labels or all: where it is followed"),
        ("adapters", ("parts", "make", "targets", "rank", "alpha", "kind"), "adapters", "loss and gradients, by"
         " `LAYER.lora_A`, `LAYER.lora_B`, `LAYER.lora_magnitude`, of the adapters `make(weight, rank)` on the weights"
         " whose names end so; kind is lora or dora"),
        ("adamw", ("makers", "hyper"), "optimizer step", "weights after each step from the gradients that"
         " `makers[n](weight at the start)` gives"),
        ("losses", ("batches", "hyper"), "ten losses", "the loss of each batch before its AdamW step"),
        ("merged", ("tokens",), "adapter merge", "logits with a LoRA beside the weights, and merged into them"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """Another way to the logits of a sequence, of a candidate that is run whole, and the methods that it takes."""

    kind: str
    check: str
    needs: tuple[str, ...] = ()
    bitwise: bool = False  # compared with the candidate's own logits alone


WAYS: tuple[Way, ...] = (
    Way("rerun", "metamorphic", bitwise=True),
    Way("batch", "metamorphic"),
    Way("cached", "cache", ("prefill", "decode")),
    Way("chunked", "cache", ("prefill", "decode")),
    Way("packed", "metamorphic", ("packed",)),
    Way("compiled", "metamorphic", ("compiled",)),
)
Driver = Literal["whole", "streamed", "tokens"]
# What each driver cannot do without; `load_candidate` refuses a candidate that lacks it.
DRIVEN_BY: dict[Driver, str] = {"whole": "__call__", "streamed": "stream", "tokens": "next_tokens"}


def _are_dtypes(value: Any) -> bool:
    known = {*DTYPES, *DTYPES.values()}
    return isinstance(value, tuple | list | set | frozenset) and all(_hashable(v) and v in known for v in value)


def _hashable(value: Any) -> bool:
    return isinstance(value, str | torch.dtype)


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("dtypes", "what it computes in: other dtypes are not covered", '`("fp32", "bf16")`', _are_dtypes),
    Attribute("integers", "its weights are integers (below)", '`"int8"`, `"int4/32"`', lambda v: isinstance(v, str)),
    Attribute("activations", "it rounds the inputs of its linear layers", '`"int8/32"`, `"int8"`, `"fp8"`, `"fp16"`',
              lambda v: isinstance(v, str)),
    Attribute("kv", "it rounds keys and values", '`"fp16"`, `"bf16"`, `"fp8"`, `"int8"`', lambda v: isinstance(v, str)),
    Attribute("attention_dtype", "it rounds queries and attention weights", '`"fp16"`, `"bf16"`',
              lambda v: isinstance(v, str)),
    Attribute("max_positions", "how many positions it holds: prompts are kept within them", "an int",
              lambda v: type(v) is int and v > 0),
    Attribute("last_only", "model(tokens) returns the last token's logits alone, `(B, 1, V)`: it is asked prefix by"
              " prefix", "True", lambda v: type(v) is bool, False),
    Attribute("streamed", "it is to be run by `stream`", "True", lambda v: type(v) is bool, False),
    Attribute("notices", "remarks for the report", "strings",
              lambda v: isinstance(v, list | tuple) and all(isinstance(x, str) for x in v), ()),
)  # fmt: skip

# Names by which a parameter goes as well: position counts when called, the name tells what is meant by it.
ALSO: dict[str, tuple[str, ...]] = {
    "tokens": ("token", "ids", "idx", "input_ids", "token_ids", "tok", "x", "inputs"),
    "ids": ("tokens", "prompt", "input_ids", "token_ids", "context"),
    "n": ("count", "max_tokens", "max_new_tokens", "k"),
    "text": ("string", "s", "prompt"),
    "dialog": ("messages", "conversation", "chat", "dialogue"),
    "positions": ("position", "pos", "position_ids", "p"),
    "doc_ids": ("docs", "documents", "document_ids"),
    "targets": ("labels", "y", "target"),
    "name": ("op", "tap"),
    "inputs": ("given", "taps", "x"),
    "documents": ("docs",),
    "parts": ("micro_batches", "batches"),
    "makers": ("steps", "gradients"),
    "hyper": ("settings", "training"),
    "path": ("file", "tokenizer"),
}


def accepted(method: Method) -> list[list[str]]:
    """The names that each parameter may go by."""
    return [[name, *ALSO.get(name, ())] for name in method.takes]


def _found(target: Any, name: str) -> Any:
    """The attribute; None where there is none, or asking for it fails."""
    try:
        return getattr(target, name, None)
    except Exception:
        return None


def declared(target: Any, name: str) -> Any:
    """An attribute of the table as `target`, a candidate or its `load`, declares it; its default where it does not."""
    row = next(a for a in ATTRIBUTES if a.name == name)
    value = _found(target, name)
    return row.default if value is None or not row.fits(value) else value


def declared_dtypes(target: Any) -> list[str] | None:
    """The names of the run dtypes that `target` says it has; None where it does not say."""
    found = declared(target, "dtypes")
    return None if found is None else [n for n, kind in DTYPES.items() if n in found or kind in found]


def refuse_undeclared(target: Any, dtype: str) -> None:
    """Raises NotImplementedError where a candidate, or its `load`, declares its dtypes, and not this one."""
    names = declared_dtypes(target)
    if names is not None and dtype not in names:
        raise NotImplementedError(f"the candidate's dtypes are {', '.join(names) or 'none'}")


@dataclass
class Interface:
    """What one candidate, or its trainer, has of the table: the only way in which the harness calls it."""

    target: Any
    methods: tuple[Method, ...] = METHODS
    file: str | None = None  # the user's own, whose lines a crash names
    note: Callable[[str], None] = lambda asked: None  # told what is asked, before it is
    ignored: dict[str, str] = field(default_factory=dict)  # by name: why what is there is not the interface's
    has: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for method in self.methods:
            value = _found(self.target, method.name)
            if value is None:
                continue
            if why := outside.misfit(value, method.name, accepted(method)):
                self.ignored[method.name] = f"{why}, the interface has {method.signature}"
            else:
                self.has.add(method.name)
        for row in ATTRIBUTES if self.methods is METHODS else ():
            value = _found(self.target, row.name)
            if value is not None and not row.fits(value):
                self.ignored[row.name] = f"it is {kind_of(value)}, the interface has {row.values}"

    @property
    def notices(self) -> list[str]:
        """One remark for each name that is there and is not the interface's."""
        of = "candidate" if self.methods is METHODS else "trainer"
        return [f"the {of}'s {name} is ignored: {why}" for name, why in self.ignored.items()]

    @property
    def driver(self) -> Driver:
        """How it is run: one that has tokens has no logits to give; one that says so is run layer by layer."""
        if "next_tokens" in self.has:
            return "tokens"
        return "streamed" if self.declared("streamed") else "whole"

    def lacks_any(self, names: tuple[str, ...]) -> str | None:
        """Why the first of these that is missing is not asked; None where all are there."""
        return next((self.lacks(name) for name in names if name not in self.has), None)

    def lacks(self, name: str) -> str:
        """Why a method is not asked; that one of its name is ignored is a notice of its own."""
        return self.row(name).why_missing

    @property
    def lacking(self) -> dict[str, str]:
        return {method.name: self.lacks(method.name) for method in self.methods if method.name not in self.has}

    def row(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    def ask(self, name: str, *args: Any) -> Any:
        """Call a method of the table. Raises NotImplementedError as it does, UsageError, and Crashed for the rest."""
        signature = self.row(name).signature
        self.note(signature)
        with asking(signature, self.file):
            return getattr(self.target, name)(*args)

    def declared(self, name: str) -> Any:
        return declared(self.target, name)

    @property
    def conditions(self) -> Conditions:
        """What is declared of rounding. Raises UsageError for a scheme that is none."""
        return Conditions(**{field.name: self.declared(field.name) for field in fields(Conditions)})


def lacking(meta: dict[str, Any], name: str) -> str:
    """What a report says about a method that a candidate, of whose trace.json `meta` is, was not asked."""
    said = (meta.get("lacking") or {}).get(name)
    return said or next(method for method in METHODS if method.name == name).why_missing


@contextmanager
def asking(signature: str, file: str | None) -> Iterator[None]:
    """The candidate's own code runs here: what it raises becomes Crashed, but for what it may raise."""
    try:
        yield
    except (NotImplementedError, UsageError, Crashed, Wrong):  # the latter two: of a candidate that is a program
        raise
    except (Exception, SystemExit) as error:
        # Errors of our own readers are the user's input, and one line: they are no crash.
        if type(error).__name__ in ("CheckpointError", "TokenizerError"):
            raise UsageError(str(error)) from error
        raise Crashed.of(error, signature, file) from error


def load_candidate(
    load: Callable[..., Any], checkpoint: str, dtype: str, device: str, note: Callable[[str], None] = lambda asked: None
) -> Interface:
    """The candidate at one dtype. Raises NotImplementedError where it has none, UsageError, and Crashed."""
    file, signature = own_file(load), f"load(checkpoint, {dtype}, {device})"
    note(signature)
    with asking(signature, file):
        target = load(checkpoint, DTYPES[dtype], device)
    found = Interface(target, METHODS, file, note)
    if (need := DRIVEN_BY[found.driver]) not in found.has:
        cannot = "cannot be called" if need == "__call__" else f"has no {found.row(need).signature}"
        raise Crashed(f"{signature} returned {kind_of(target)}, which {cannot}", None)
    return found


def own_file(load: Any) -> str | None:
    """The file that `load` was written in."""
    try:
        return inspect.getsourcefile(inspect.unwrap(load))
    except (TypeError, ValueError):
        return inspect.getsourcefile(type(load)) if type(load).__module__ not in ("builtins", "functools") else None


def method_table(methods: tuple[Method, ...]) -> str:
    """As docs/parity.md shows it."""
    feeds = "check" if methods is METHODS else "metric"
    rows = [f"| method | {feeds} | returns |", "| --- | --- | --- |"]
    rows += [f"| `{m.signature}` | `{m.check}` | {m.returns} |" if feeds == "check" else
             f"| `{m.signature}` | {m.metric} | {m.returns} |" for m in methods]  # fmt: skip
    return "\n".join(rows)


def attribute_table() -> str:
    rows = ["| attribute | says | value |", "| --- | --- | --- |"]
    return "\n".join([*rows, *(f"| `{a.name}` | {a.meaning} | {a.values} |" for a in ATTRIBUTES)])


if __name__ == "__main__":
    print("\n\n".join((method_table(METHODS), attribute_table(), method_table(TRAINER))))
