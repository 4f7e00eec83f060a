"""Run a candidate on a case through whatever interface it has, and write its trace.

Besides the teacher-forced forward pass: greedy text, prefill + decode, chunked prefill, a rerun, rows in a batch,
packed documents. What the interface cannot do goes into the trace as `uncovered`, so that a report can say so.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parity import training
from parity.contract import DTYPES, Case, UsageError
from parity.forced import finish_ops, record_ops
from parity.trace import Trace, TraceWriter, by_part

Progress = Callable[[str, float], None]
CHUNKS = 8  # of a chunked prefill; their size is made odd, so that they never line up with a block size
DOCUMENTS = 3
SCHEME = r"int[2-8](/[1-9]\d*)?"  # integers of so many bits, one scale for each row or for so many inputs of it
EXTRA_ROWS, EXTRA_LOGITS = 64, 1 << 22  # of each other way to run a sequence, at most: positions, numbers


@dataclass
class Recording:
    """What one dtype's run leaves in trace.json besides the tensors."""

    generated: list[list[int]] = field(default_factory=list)
    same: dict[str, float] = field(default_factory=dict)  # bitwise relations: largest |difference|
    extra: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # kind -> sequence -> positions
    answers: list[dict[str, int]] = field(default_factory=list)  # where there are no logits: position -> next token
    uncovered: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def can(candidate: object, method: str) -> bool:
    return callable(getattr(candidate, method, None))


def logits_of(out: Any) -> Tensor:
    """Logits that a candidate returned; an output object with a `logits` field, as transformers returns, will do."""
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the candidate returned {type(out).__name__}: expected a Tensor of logits (B, T, V)")
    return logits.detach()


class Recorder:
    """One candidate at one dtype on one case. `sequences` are the teacher-forced token ids, prompts included."""

    def __init__(self, candidate: Any, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> None:
        self.candidate, self.case, self.dtype, self.writer, self.progress = candidate, case, dtype, writer, progress
        assert case.prompts is not None
        self.sequences = case.prompts
        self.prompt_lengths = case.prompt_lengths or [len(p) for p in case.prompts]
        self.large = case.positions is not None
        self.out = Recording()

    def run(self) -> Recording:
        with torch.no_grad():
            tensors = self._forward() | self._extras()
        for part, content in by_part(tensors):
            self.writer.part(self.dtype, part, content)
        return self.out

    def _tokens(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.case.device)

    def _timed(self, function: Callable[..., Any], *args: Tensor) -> Any:
        """A call of the candidate, counted as time in its forward passes."""
        started = time.perf_counter()
        out = function(*args)
        self.out.seconds += time.perf_counter() - started
        return out

    def _call(self, function: Callable[..., Any], *args: Tensor) -> Tensor:
        return logits_of(self._timed(function, *args))

    def _forward(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, ids in enumerate(self.sequences):
            tokens = self._tokens(ids)
            found[f"{i}/logits"] = self._checked(self._call(self.candidate, tokens), (1, len(ids)))[0].cpu()
            if can(self.candidate, "taps") and self.case.record == "taps":
                for name, tensor in self._timed(self.candidate.taps, tokens).items():
                    if name != "logits":
                        found[f"{i}/{name}"] = self._chosen(i, tensor.detach()[0]).cpu()
            self.progress(f"{self.dtype} forward", (i + 1) / len(self.sequences))
        return found

    def _chosen(self, sequence: int, tensor: Tensor) -> Tensor:
        return tensor if self.case.positions is None else tensor[self.case.positions[sequence]]

    @staticmethod
    def _checked(logits: Tensor, shape: tuple[int, int]) -> Tensor:
        if logits.dim() != 3 or tuple(logits.shape[:2]) != shape:
            raise ValueError(f"the candidate's logits have shape {tuple(logits.shape)}: expected {(*shape, 'V')}")
        return logits

    def _extras(self) -> dict[str, Tensor]:
        by_length = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))
        chosen = by_length[:1] if self.large else list(dict.fromkeys((by_length[0], by_length[-1])))
        found: dict[str, Tensor] = {}
        for step in (self._rerun, self._batch, self._cached, self._chunked, self._documents, self._compiled):
            self.progress(f"{self.dtype} {step.__name__[1:]}", 1.0)
            found |= step(chosen)
        self._greedy(chosen)
        return found

    def _keep(self, kind: str, sequence: int, positions: list[int], logits: Tensor) -> dict[str, Tensor]:
        """Logits (N, V) of another way to run a sequence: EXTRA_ROWS of its positions, fewer for EXTRA_LOGITS."""
        n = min(EXTRA_ROWS, len(positions), max(16, EXTRA_LOGITS // logits.shape[-1]))
        rows = torch.linspace(0, len(positions) - 1, n).int().tolist()
        positions, logits = [positions[row] for row in rows], logits[rows]
        self.out.extra.setdefault(kind, {})[str(sequence)] = positions
        return {f"{sequence}/logits@{kind}": logits.cpu()}

    def _rerun(self, chosen: list[int]) -> dict[str, Tensor]:
        tokens = self._tokens(self.sequences[chosen[0]])
        first, second = self._call(self.candidate, tokens), self._call(self.candidate, tokens)
        self.out.same["rerun"] = largest(first, second)
        return {}

    def _batch(self, chosen: list[int]) -> dict[str, Tensor]:
        """Every sequence cut to the shortest's length, as rows of one batch."""
        rows = list(range(min(4, len(self.sequences))))
        length = min(len(self.sequences[i]) for i in rows)
        if len(rows) < 2:
            self.out.uncovered["batch"] = "one sequence makes no batch"
            return {}
        tokens = torch.tensor([self.sequences[i][:length] for i in rows], device=self.case.device)
        logits = self._checked(self._call(self.candidate, tokens), (len(rows), length))
        found: dict[str, Tensor] = {}
        for row, i in enumerate(rows):
            found |= self._keep("batch", i, list(range(length)), logits[row])
        return found

    def _cached(self, chosen: list[int]) -> dict[str, Tensor]:
        """Prefill the prompt, then decode the rest of the sequence token by token."""
        return self._through_cache("cached", chosen, lambda i: self.prompt_lengths[i], lambda n: 1)

    def _chunked(self, chosen: list[int]) -> dict[str, Tensor]:
        """Prefill a third, then go on in chunks of an odd size."""
        return self._through_cache(
            "chunked", chosen, lambda i: max(1, len(self.sequences[i]) // 3), lambda n: (n // CHUNKS) | 1
        )

    def _through_cache(
        self, kind: str, chosen: list[int], first: Callable[[int], int], chunk: Callable[[int], int]
    ) -> dict[str, Tensor]:
        if not (can(self.candidate, "prefill") and can(self.candidate, "decode")):
            self.out.uncovered[kind] = "the candidate has no prefill() and decode()"
            return {}
        found: dict[str, Tensor] = {}
        for i in chosen:
            ids = self.sequences[i]
            # A prompt without continuation is decoded from its middle on.
            start = first(i) if first(i) < len(ids) else max(1, len(ids) // 2)
            try:
                positions, logits = self._decode_on(ids, start, chunk(len(ids)))
            except NotImplementedError as error:
                self.out.uncovered[kind] = str(error) or "the candidate's decode() takes one token at a time"
                return {}
            found |= self._keep(kind, i, positions, logits)
        return found

    def _decode_on(self, ids: list[int], start: int, chunk: int) -> tuple[list[int], Tensor]:
        """Logits (N, V) of the positions that prefill and decode returned: all of a call's tokens, or its last."""
        positions: list[int] = []
        rows: list[Tensor] = []
        for begin in (0, *range(start, len(ids), chunk)):
            end = start if begin == 0 else min(begin + chunk, len(ids))
            step = self.candidate.prefill if begin == 0 else self.candidate.decode
            logits = self._call(step, self._tokens(ids[begin:end]))
            logits = (logits if logits.dim() == 3 else logits.unsqueeze(1))[0]  # (n or 1, V)
            positions += range(end - logits.shape[0], end)
            rows.append(logits)
        return positions, torch.cat(rows)

    def _documents(self, chosen: list[int]) -> dict[str, Tensor]:
        """Sequences packed in one row: each as if alone, and untouched, bit for bit, by a change of the first."""
        if not can(self.candidate, "packed"):
            self.out.uncovered["packed"] = "the candidate has no packed(tokens, doc_ids)"
            return {}
        if self.large or len(self.sequences) < 2:
            self.out.uncovered["packed"] = "packing is checked on small checkpoints with several sequences"
            return {}
        documents = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))[:DOCUMENTS]
        tokens = self._tokens([t for i in documents for t in self.sequences[i]])
        doc_ids = self._tokens([n for n, i in enumerate(documents) for _ in self.sequences[i]])
        logits = self._call(self.candidate.packed, tokens, doc_ids)[0]
        changed, first = tokens.clone(), len(self.sequences[documents[0]])
        changed[:, :first] = changed[:, :first].flip(1)
        perturbed = self._call(self.candidate.packed, changed, doc_ids)[0]
        self.out.same["another document changed"] = largest(logits[first:], perturbed[first:])
        found: dict[str, Tensor] = {}
        start = 0
        for i in documents:
            n = len(self.sequences[i])
            found |= self._keep("packed", i, list(range(n)), logits[start : start + n])
            start += n
        return found

    def _compiled(self, chosen: list[int]) -> dict[str, Tensor]:
        if not can(self.candidate, "compiled"):
            self.out.uncovered["compiled"] = "the candidate has no compiled(tokens)"
            return {}
        ids = self.sequences[chosen[0]]
        try:
            logits = self._checked(self._call(self.candidate.compiled, self._tokens(ids)), (1, len(ids)))
        except NotImplementedError as error:
            self.out.uncovered["compiled"] = str(error)
            return {}
        return self._keep("compiled", chosen[0], list(range(len(ids))), logits[0])

    def _greedy(self, chosen: list[int]) -> None:
        """The candidate's own greedy text after each prompt, through its cache where it has one."""
        for i, ids in enumerate(self.sequences):
            n = len(ids) - self.prompt_lengths[i] if i in chosen or not self.large else 0
            prompt = ids[: self.prompt_lengths[i]]
            self.out.generated.append(self._continue(prompt, n) if n > 0 else [])
            self.progress(f"{self.dtype} greedy", (i + 1) / len(self.sequences))

    def _continue(self, prompt: list[int], n: int) -> list[int]:
        cached = can(self.candidate, "prefill") and can(self.candidate, "decode")
        new: list[int] = []
        while len(new) < n:
            if not cached:
                logits = self._call(self.candidate, self._tokens(prompt + new))
            elif not new:
                logits = self._call(self.candidate.prefill, self._tokens(prompt))
            else:
                logits = self._call(self.candidate.decode, self._tokens(new[-1:]))
            new.append(int(logits.flatten(0, -2)[-1].argmax()))
        return new


def largest(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| as a float; NaN where either holds one, which no bound lets pass."""
    if torch.equal(a, b):
        return 0.0
    return float((a.double() - b.double()).abs().max())


def record_identity(candidate: Any, case: Case, writer: TraceWriter) -> dict[str, Any]:
    """What does not depend on the dtype: config, weights, RoPE table, token ids, dialogs."""
    meta: dict[str, Any] = {"config": candidate.config() if can(candidate, "config") else None}
    meta["weights"] = candidate.weights() if case.weights and can(candidate, "weights") else None
    if case.rope_positions and can(candidate, "rope"):
        cos, sin = candidate.rope(torch.tensor(case.rope_positions))
        writer.rope(cos.float().cpu(), sin.float().cpu())
    if case.tokenizer is not None and can(candidate, "use_tokenizer"):
        candidate.use_tokenizer(case.tokenizer)
    encode = candidate.encode if can(candidate, "encode") else None
    meta["token_ids"] = [list(encode(text)) for text in case.texts] if encode and case.texts else None
    plain = candidate.encode_plain if can(candidate, "encode_plain") else None
    meta["corpus_ids"] = [list(plain(text)) for text in case.corpus] if plain else None
    chat = candidate.encode_chat if can(candidate, "encode_chat") else None
    meta["dialog_ids"] = [chat(dialog) for dialog in case.dialogs] if chat else None
    return meta


def record(
    load: Callable[[str, torch.dtype, str], Any],
    case: Case,
    writer: TraceWriter,
    progress: Progress,
    forced: dict[str, Trace] | None = None,
) -> None:
    """Load the candidate at each dtype of the case, run it, and write its trace.

    `forced`: by reference, the cut traces whose inputs its operations are given (see parity/forced.py).

    A candidate whose weights are integers says so in its attribute `integers`: "int8" (one scale for each output row),
    "int4/32" (one for each 32 inputs). It is then judged by the error that such rounding makes in the oracle.

    A candidate that has no logits to give has `next_tokens(ids, n)` instead, the greedy tokens after `ids`.

    A candidate with a method `stream(sequences, positions)` yielding (part, {"sequence/tap": tensor}) may set its
    attribute `streamed` to True: it is then run layer by layer, and only its forward pass is judged. Dtypes at which
    the model does not fit into memory are asked only of a `load` whose attribute `streams` is True.
    """
    assert case.prompts is not None
    meta: dict[str, Any] = {
        "implementation": "candidate",
        "sequences": case.prompts,
        "dtypes": {},
        "seconds_forward": 0.0,
    }
    meta |= {"prompt_lengths": case.prompt_lengths or [len(p) for p in case.prompts], "positions": case.positions}
    meta |= {"generated": {}, "self": {}, "extra": {}, "uncovered": {}, "streamed": {}, "errata": [], "notices": []}
    meta |= {"ops": {}, "integers": None, "answers": {}}
    for n, dtype in enumerate(case.dtypes):
        if dtype in case.too_large and not getattr(load, "streams", False):
            continue
        candidate = load(case.checkpoint, DTYPES[dtype], case.device)
        if n == 0:
            meta |= record_identity(candidate, case, writer)
        meta["integers"] = scheme = getattr(candidate, "integers", None)
        if scheme is not None and not re.fullmatch(SCHEME, scheme):
            raise UsageError(
                f"the candidate's integers are {scheme!r}: expected int8, or int4/32 (a scale for 32 inputs)"
            )
        meta["streamed"][dtype] = bool(getattr(candidate, "streamed", False))
        if can(candidate, "next_tokens"):
            out = record_answers(candidate, case, dtype, progress)
        elif meta["streamed"][dtype]:
            out = record_streamed(candidate, case, dtype, writer, progress)
        else:
            out = Recorder(candidate, case, dtype, writer, progress).run()
            for name, given in (forced or {}).items() if can(candidate, "ops") and scheme is None else ():
                ops_writer = meta["ops"].setdefault(name, TraceWriter(writer.folder / "ops" / name))
                record_ops(candidate, dtype, given, ops_writer, case.device)
        meta["dtypes"][dtype] = dtype
        meta["seconds_forward"] += out.seconds
        meta["uncovered"] |= out.uncovered
        meta["generated"][dtype], meta["self"][dtype], meta["extra"][dtype] = out.generated, out.same, out.extra
        meta["answers"][dtype] = out.answers
        meta["notices"] = list(getattr(candidate, "notices", []))
        if case.training is not None and dtype == training.DTYPE and can(candidate, "loss_and_grads"):
            progress(f"{dtype} training", 1.0)
            meta["training"] = training.record_training(candidate, case.training, case.prompts[0], writer.folder)
            meta["seconds_forward"] += meta["training"]["seconds"]
        del candidate
    for name, ops_writer in meta["ops"].items():
        finish_ops(ops_writer, (forced or {})[name], case.dtypes)
    writer.finish(meta | {"ops": sorted(meta["ops"])})


def record_answers(candidate: Any, case: Case, dtype: str, progress: Progress) -> Recording:
    """Of a candidate that has tokens alone: the next token at some positions of each sequence, and greedy text.

    Greedy text is not enough: a model without RoPE scaling writes what the right one writes until the text is long.
    """
    started, out = time.perf_counter(), Recording()
    assert case.prompts is not None
    lengths = case.prompt_lengths or [len(p) for p in case.prompts]
    for i, (ids, length) in enumerate(zip(case.prompts, lengths, strict=True)):
        positions = torch.linspace(0, len(ids) - 1, min(EXTRA_ROWS, len(ids))).int().tolist()
        first = {str(p): candidate.next_tokens(ids[: p + 1], 1) for p in positions}
        out.answers.append({p: found[0] for p, found in first.items() if found})
        n = len(ids) - length
        out.generated.append(candidate.next_tokens(ids[:length], n)[:n] if n else [])
        progress(f"{dtype} answers", (i + 1) / len(case.prompts))
    out.seconds = time.perf_counter() - started
    why = "the candidate gives tokens and no logits"
    out.uncovered = dict.fromkeys(("batch", "cached", "chunked", "packed", "compiled"), why)
    return out


def record_streamed(candidate: Any, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> Recording:
    """A forward pass layer by layer; everything that needs the whole model at once is not covered."""
    started, out = time.perf_counter(), Recording()
    n_layers = candidate.config()["n_layers"]
    assert case.prompts is not None
    with torch.no_grad():
        for n, (part, tensors) in enumerate(candidate.stream(case.prompts, case.positions)):
            keep = tensors if case.record == "taps" else {k: t for k, t in tensors.items() if k.endswith("/logits")}
            writer.part(dtype, part, keep)
            progress(f"{dtype} {part}", (n + 1) / (n_layers + 2))
    out.seconds = time.perf_counter() - started
    why = f"{dtype} of this checkpoint is run layer by layer"
    out.uncovered = dict.fromkeys(("batch", "cached", "chunked", "packed", "compiled"), why)
    return out
