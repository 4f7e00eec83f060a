"""Load a candidate at each dtype of a case, run it through whatever interface it has, and write its trace.

What each dtype found is on disk before the next one begins, so that nothing finished is lost with a process that dies.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from parity.candidates import answers
from parity.candidates.conditions import Conditions
from parity.candidates.crash import Crashed, Failure, Wrong, failure
from parity.candidates.interface import Driver, Interface, load_candidate, refuse_undeclared
from parity.contract import Case
from parity.run import training
from parity.run.recording import Progress, Recording, first_line
from parity.run.streamed import run_streamed
from parity.run.teacher_forcing import finish_ops, record_ops
from parity.run.tokens import run_tokens
from parity.run.whole import run_whole
from parity.trace import Trace, TraceWriter

Load = Callable[[str, torch.dtype, str], Any]
Drive = Callable[[Interface, Case, str, TraceWriter, Progress], Recording]
DRIVERS: dict[Driver, Drive] = {"whole": run_whole, "streamed": run_streamed, "tokens": run_tokens}
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
    in the oracle. How it is run is told by what it has (DRIVERS). Dtypes at which the model does not fit into memory
    are asked only of a `load` whose attribute `streams` is True.
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
            candidate = self._load(dtype)
            self._run(candidate, dtype)
        except NotImplementedError as error:
            self.meta["undone"][dtype] = first_line(error) or f"the candidate says that it has no {dtype}"
        except (Crashed, Wrong) as error:
            self.meta["failures"].append(failure(error, "logits", "G3", dtype).as_json())

    def _load(self, dtype: str) -> Interface:
        def note(asked: str) -> None:
            (self.writer.folder / ASKED).write_text(f"{asked} at {dtype}")

        refuse_undeclared(self.load, dtype)
        candidate = load_candidate(self.load, self.case.checkpoint, dtype, self.case.device, note)
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
        out = DRIVERS[candidate.driver](candidate, case, dtype, self.writer, self.progress)
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


def last_asked(folder: Path) -> str | None:
    """What a candidate was asked last, of a process that died: "taps(tokens) at bf16"."""
    file = folder / ASKED
    return file.read_text() if file.is_file() else None
