"""Load a candidate at each dtype of a case, run it through whatever interface it has, and write its trace.

What each dtype found is on disk before the next one begins, so that nothing finished is lost with a process that dies.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.candidates import answers
from parity.candidates.conditions import Conditions
from parity.candidates.crash import Crashed, Failure, Unasked, Wrong, failure
from parity.candidates.interface import Interface, asking, loaded, refuse_undeclared
from parity.contract import Case
from parity.run import training
from parity.run.recorder import EXTRA_ROWS, WAYS, Progress, Recorder, Recording, first_line
from parity.run.teacher_forcing import finish_ops, record_ops
from parity.trace import Trace, TraceWriter

Load = Callable[[str, torch.dtype, str], Any]
ASKED = "asked"  # in a trace's folder: the dtype and the method that a candidate is just asked for


def record_identity(candidate: Interface, case: Case, writer: TraceWriter) -> dict[str, Any]:
    """What does not depend on the dtype: config, weights, RoPE table, token ids, dialogs."""
    asks = Identity(candidate)
    meta: dict[str, Any] = {"config": asks("config", answers.config)}
    meta["weights"] = asks("weights", answers.weights) if case.weights else None
    if case.rope_positions:
        positions = torch.tensor(case.rope_positions)
        table = asks("rope", lambda out: answers.rope(out, len(positions)), positions)
        if table is not None:
            writer.rope(*table)
    if case.tokenizer is not None:
        asks("use_tokenizer", lambda out: None, case.tokenizer)
    meta["token_ids"] = asks.each("encode", case.texts or [])
    meta["corpus_ids"] = asks.each("encode_plain", case.corpus)
    meta["dialog_ids"] = asks.each("encode_chat", case.dialogs, may_be_none=True)
    return meta | {"failures": [f.as_json() for f in asks.failures], "lacking": candidate.lacking | asks.cannot}


class Identity:
    """Asks a candidate who it is; what goes wrong in one answer leaves the others."""

    def __init__(self, candidate: Interface) -> None:
        self.candidate = candidate
        self.failures: list[Failure] = []
        self.cannot: dict[str, str] = {}  # method -> why there is no answer

    def __call__(self, method: str, read: Callable[[Any], Any], *args: Any) -> Any:
        """The answer as `read` returns it; None where there is none."""
        if method not in self.candidate.has:
            return None
        row = self.candidate.row(method)
        try:
            return read(self.candidate.ask(method, *args))
        except NotImplementedError as error:
            self.cannot[method] = first_line(error) or f"the candidate's {method}() says that it cannot do this"
        except (Crashed, Wrong) as error:
            self.failures.append(failure(error, row.check, row.gate, None))
            self.cannot[method] = f"{method}() ended in a failure"
        return None

    def each(self, method: str, texts: list[Any], may_be_none: bool = False) -> list[Any] | None:
        """The ids of each text; None where the method is missing or fails at one of them."""
        signature, found = self.candidate.row(method).signature, list[Any]()
        for text in texts:
            before = len(self.cannot)
            read = lambda out: None if out is None and may_be_none else answers.ids(out, signature)
            found.append(self(method, read, text))
            if len(self.cannot) > before or method not in self.candidate.has:
                return None
        if found and all(ids is None for ids in found):
            self.cannot[method] = f"{signature} returned None for every one"
        return found or None


def record(
    load: Load, case: Case, writer: TraceWriter, progress: Progress, forced: dict[str, Trace] | None = None
) -> None:
    """Load the candidate at each dtype of the case, run it, and write its trace.

    `forced`: by reference, the cut traces whose inputs its operations are given (see parity/run/teacher_forcing.py).

    A candidate that declares what it rounds (candidates/conditions.py) is judged by the error that such rounding makes
    in the oracle; one that has `next_tokens` has no logits to give; one that says `streamed` is run layer by layer, and
    only its forward pass is judged. Dtypes at which the model does not fit into memory are asked only of a `load`
    whose attribute `streams` is True.
    """
    assert case.prompts is not None
    lengths = case.prompt_lengths or [len(p) for p in case.prompts]
    meta: dict[str, Any] = {"implementation": "candidate", "sequences": case.prompts, "prompt_lengths": lengths}
    meta |= {"positions": case.positions, "dtypes": {}, "seconds_forward": 0.0, "generated": {}, "self": {}}
    meta |= {"extra": {}, "uncovered": {}, "streamed": {}, "errata": [], "notices": [], "ops": []}
    meta |= {"answers": {}, "log_probs": {}, "undone": {}, "failures": [], "lacking": {}, **asdict(Conditions())}
    run = Run(load, case, writer, progress, forced or {}, meta)
    for dtype in case.dtypes:
        run.dtype(dtype)
        writer.finish(meta)
    run.finish_ops()
    writer.finish(meta)


class Run:
    """A candidate's run over its dtypes; `meta` is what becomes trace.json."""

    def __init__(
        self,
        load: Load,
        case: Case,
        writer: TraceWriter,
        progress: Progress,
        forced: dict[str, Trace],
        meta: dict[str, Any],
    ) -> None:
        self.load, self.case, self.writer, self.progress = load, case, writer, progress
        self.forced, self.meta, self.identified = forced, meta, False
        self.ops: dict[str, TraceWriter] = {}

    def dtype(self, dtype: str) -> None:
        """Everything at one dtype. A dtype that is not run is `undone`, with the reason."""
        if dtype in self.case.too_large and not getattr(self.load, "streams", False):
            return
        try:
            candidate = self._loaded(dtype)
            self._run(candidate, dtype)
        except NotImplementedError as error:
            self.meta["undone"][dtype] = first_line(error) or f"the candidate says that it has no {dtype}"
        except (Crashed, Wrong) as error:
            self.meta["failures"].append(failure(error, "logits", "G3", dtype).as_json())

    def _loaded(self, dtype: str) -> Interface:
        def note(asked: str) -> None:
            (self.writer.folder / ASKED).write_text(f"{asked} at {dtype}")

        refuse_undeclared(self.load, dtype)
        candidate = loaded(self.load, self.case.checkpoint, dtype, self.case.device, note)
        refuse_undeclared(candidate.target, dtype)
        return candidate

    def _run(self, candidate: Interface, dtype: str) -> None:
        case, meta = self.case, self.meta
        if not self.identified:
            self.identified = True
            found = record_identity(candidate, case, self.writer)
            meta["failures"] += found.pop("failures")
            meta |= found
        meta |= asdict(candidate.conditions)
        meta["streamed"][dtype] = candidate.declared("streamed")
        if "next_tokens" in candidate.has:
            out = record_answers(candidate, case, dtype, self.progress)
        elif meta["streamed"][dtype]:
            out = record_streamed(candidate, case, dtype, self.writer, self.progress)
        else:
            out = Recorder(candidate, case, dtype, self.writer, self.progress).run()
        # A server's remarks are about how it could be asked, which is known now.
        meta["notices"] = list(dict.fromkeys([*meta["notices"], *candidate.declared("notices"), *candidate.notices]))
        self._keep(out)
        if out.done and "ops" in candidate.has and not Conditions.of(meta) and not meta["streamed"][dtype]:
            self._ops(candidate, out)
        if out.done and case.training is not None and dtype == training.DTYPE:
            self._train(candidate, out)
        meta["failures"] += [f.as_json() for f in out.failures]

    def _keep(self, out: Recording) -> None:
        meta, dtype = self.meta, out.dtype
        meta["seconds_forward"] += out.seconds
        meta["uncovered"] |= out.uncovered
        meta["generated"][dtype], meta["self"][dtype], meta["extra"][dtype] = out.generated, out.same, out.extra
        meta["answers"][dtype], meta["log_probs"][dtype] = out.answers, out.log_probs
        if out.done:
            meta["dtypes"][dtype] = dtype
        elif not out.failures:
            meta["undone"][dtype] = out.uncovered.get("logits", "the candidate gave nothing to compare")
        if "taps" in out.uncovered:
            meta["lacking"]["taps"] = out.uncovered["taps"]

    def _ops(self, candidate: Interface, out: Recording) -> None:
        for name, given in self.forced.items():
            writer = self.ops.get(name) or TraceWriter(self.writer.folder / "ops" / name)
            with out.step("ops", "ops", "G2"):
                record_ops(candidate, out.dtype, given, writer, self.case.device)
                self.ops[name] = writer
            if "ops" in out.uncovered:
                self.meta["lacking"]["ops"] = out.uncovered["ops"]
                return

    def finish_ops(self) -> None:
        for name, writer in self.ops.items():
            finish_ops(writer, self.forced[name], self.case.dtypes)
        self.meta["ops"] = sorted(self.ops)

    def _train(self, candidate: Interface, out: Recording) -> None:
        if "loss_and_grads" not in candidate.has:
            return
        self.progress(f"{out.dtype} training", 1.0)
        assert self.case.training is not None and self.case.prompts is not None
        with out.step("training", "training", "G8"):
            self.meta["training"] = found = training.record_training(candidate, self.case, self.writer.folder, out)
            self.meta["seconds_forward"] += found["seconds"]


@contextmanager
def counted(out: Recording) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        out.seconds += time.perf_counter() - started


def record_answers(candidate: Interface, case: Case, dtype: str, progress: Progress) -> Recording:
    """Of a candidate that has tokens alone: the next token at some positions of each sequence, and greedy text; and the
    log-probabilities that it lists.

    Greedy text is not enough: a model without RoPE scaling writes what the right one writes until the text is long.
    """
    out = Recording(dtype)
    out.uncovered = dict.fromkeys(WAYS, "the candidate gives tokens and no logits")
    with counted(out), out.step("logits", "argmax", "G6"):
        out.answers = [_next_tokens(candidate, ids, case) for ids in case.prompts or []]
        out.done = True
        progress(f"{dtype} answers", 0.4)
    if out.done and "log_probs" in candidate.has:
        with counted(out), out.step("log_probs", "logits", "G3"):
            out.log_probs = [_log_probs(candidate, ids, case) for ids in case.prompts or []]
            if not any(out.log_probs):
                raise NotImplementedError("the candidate lists no log-probabilities")
            progress(f"{dtype} log-probabilities", 0.7)
    with counted(out), out.step("greedy", "greedy", "G6"):
        if out.done:
            out.generated = list(_texts(candidate, case))
    progress(f"{dtype} answers", 1.0)
    return out


def _next_tokens(candidate: Interface, ids: list[int], case: Case) -> dict[str, Any]:
    """Position -> the token after it, at some positions of one sequence: those that can be asked."""
    found = {}
    for p in _some_positions(ids):
        with suppress(Unasked):
            found[str(p)] = _ask_tokens(candidate, ids[: p + 1], 1, case)[0]
    return found


def _some_positions(ids: list[int]) -> list[int]:
    return torch.linspace(0, len(ids) - 1, min(EXTRA_ROWS, len(ids))).int().tolist()


def _log_probs(candidate: Interface, ids: list[int], case: Case) -> dict[str, dict[str, float]]:
    """Position -> id -> its log-probability there, of one sequence."""
    found = candidate.ask("log_probs", ids, _some_positions(ids))
    return answers.log_probs(found, candidate.row("log_probs").signature, len(ids), case.vocab_size)


def _texts(candidate: Interface, case: Case) -> Iterator[list[int]]:
    """The greedy text after each prompt; shorter where the candidate stops."""
    assert case.prompts is not None
    lengths = case.prompt_lengths or [len(p) for p in case.prompts]
    for ids, length in zip(case.prompts, lengths, strict=True):
        n = len(ids) - length
        try:
            yield _ask_tokens(candidate, ids[:length], n, case)[:n] if n else []
        except Unasked:
            yield []


def _ask_tokens(candidate: Interface, ids: list[int], n: int, case: Case) -> list[int]:
    asked = f"next_tokens({len(ids)} ids, {n})"
    found = answers.ids(candidate.ask("next_tokens", ids, n), asked, case.vocab_size)
    if not found or len(found) > n:
        raise Wrong(f"{asked} returned {len(found) or 'no'} token{'s' * (len(found) > 1)}")
    return found


def record_streamed(candidate: Interface, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> Recording:
    """A forward pass layer by layer; everything that needs the whole model at once is not covered."""
    out = Recording(dtype)
    out.uncovered = dict.fromkeys(WAYS, f"{dtype} of this checkpoint is run layer by layer")
    with counted(out), out.step("logits", "logits", "G3"), torch.no_grad():
        n_parts = 2 + (candidate.ask("config")["n_layers"] if "config" in candidate.has else 100)
        for n, (part, tensors) in enumerate(_parts(candidate, case)):
            keep = tensors if case.record == "taps" else {k: t for k, t in tensors.items() if k.endswith("/logits")}
            writer.part(dtype, part, keep)
            progress(f"{dtype} {part}", (n + 1) / n_parts)
        out.done = True
    return out


def _parts(candidate: Interface, case: Case) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What stream() yields; what it raises on the way is a crash of it."""
    made = candidate.ask("stream", case.prompts, case.positions)
    while True:
        with asking(candidate.row("stream").signature, candidate.file):
            found = next(made, None)  # of anything but an iterator, a TypeError
        if found is None:
            return
        yield answers.part(found)


def last_asked(folder: Path) -> str | None:
    """What a candidate was asked last, of a process that died: "taps(tokens) at bf16"."""
    file = folder / ASKED
    return file.read_text() if file.is_file() else None
