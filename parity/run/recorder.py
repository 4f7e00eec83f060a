"""Run one candidate at one dtype on a case through whatever interface it has.

Besides the teacher-forced forward pass: greedy text, prefill + decode, chunked prefill, a rerun, rows in a batch,
packed documents. What the interface cannot do is left as `uncovered`, what goes wrong as `failures`, and neither ends
the run: each step is taken for itself, and what the others found is kept.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parity.candidates import answers
from parity.candidates.crash import Crashed, Failure, Wrong, failure
from parity.candidates.interface import Interface
from parity.contract import Case
from parity.trace import TraceWriter, by_part

Progress = Callable[[str, float], None]
CHUNKS = 8  # of a chunked prefill; their size is made odd, so that they never line up with a block size
DOCUMENTS = 3
EXTRA_ROWS, EXTRA_LOGITS = 64, 1 << 22  # of each other way to run a sequence, at most: positions, numbers
WAYS = ("batch", "cached", "chunked", "packed", "compiled")  # other ways to the same logits
CACHE_WAYS = ("cached", "chunked")


@dataclass
class Recording:
    """What one dtype's run leaves in trace.json besides the tensors."""

    dtype: str
    generated: list[list[int]] = field(default_factory=list)
    same: dict[str, float] = field(default_factory=dict)  # bitwise relations: largest |difference|
    extra: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # kind -> sequence -> positions
    answers: list[dict[str, int]] = field(default_factory=list)  # where there are no logits: position -> next token
    log_probs: list[dict[str, dict[str, float]]] = field(default_factory=list)  # position -> id -> log-probability
    uncovered: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    done: bool = False  # the forward pass, without which nothing is compared
    seconds: float = 0.0

    @contextmanager
    def step(self, kind: str, check: str, gate: str, metric: str | None = None) -> Iterator[None]:
        """One thing asked of the candidate: what it cannot do and what goes wrong in it is written down."""
        try:
            yield
        except NotImplementedError as error:
            self.extra.pop(kind, None)
            self.uncovered[kind] = first_line(error) or "the candidate says that it cannot do this"
        except (Crashed, Wrong) as error:
            self.extra.pop(kind, None)
            self.failures.append(failure(error, check, gate, self.dtype, metric))
            self.uncovered[kind] = "it ended in a failure"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


class Recorder:
    """One candidate at one dtype on one case. `sequences` are the teacher-forced token ids, prompts included."""

    def __init__(self, candidate: Interface, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> None:
        self.candidate, self.case, self.dtype, self.writer, self.progress = candidate, case, dtype, writer, progress
        assert case.prompts is not None
        self.sequences = case.prompts
        self.prompt_lengths = case.prompt_lengths or [len(p) for p in case.prompts]
        self.large = case.positions is not None
        self.vocab_size = case.vocab_size  # where the case does not say: of the first answer
        self.last_only = self.candidate.declared("last_only")
        self.out = Recording(dtype)

    def run(self) -> Recording:
        tensors: dict[str, Tensor] = {}
        with torch.no_grad():
            with self.out.step("logits", "logits", "G3"):
                tensors |= self._forward()
                self.out.done = True
            if self.out.done:
                with self.out.step("taps", "taps", "G3"):
                    tensors |= self._taps()
                tensors |= self._extras()
        for part, content in by_part(tensors):
            self.writer.part(self.dtype, part, content)
        return self.out

    def _tokens(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.case.device)

    def _ask(self, method: str, *args: Any) -> Any:
        """A call of the candidate, counted as time in its forward passes."""
        started = time.perf_counter()
        try:
            return self.candidate.ask(method, *args)
        finally:
            self.out.seconds += time.perf_counter() - started

    def _logits(self, method: str, *args: Any, last: bool = False) -> Tensor:
        """Logits (B, T, V) of a method that is given tokens (B, T) first; with `last` (B, 1, V) will do."""
        (rows, length), asked = args[0].shape, self.candidate.row(method).signature
        found = answers.logits(self._ask(method, *args), asked, rows, length, self.vocab_size, last)
        self.vocab_size = found.shape[-1]
        return found

    def _call(self, tokens: Tensor) -> Tensor:
        """model(tokens): prefix by prefix where it gives the last token's logits alone."""
        if not self.last_only:
            return self._logits("__call__", tokens)
        ends = range(1, tokens.shape[1] + 1)
        return torch.cat([self._logits("__call__", tokens[:, :end], last=True)[:, -1:] for end in ends], 1)

    def _forward(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, ids in enumerate(self.sequences):
            found[f"{i}/logits"] = self._call(self._tokens(ids))[0].cpu()
            self.progress(f"{self.dtype} forward", (i + 1) / len(self.sequences))
        return found

    def _taps(self) -> dict[str, Tensor]:
        if "taps" not in self.candidate.has or self.case.record != "taps":
            return {}
        found: dict[str, Tensor] = {}
        for i, ids in enumerate(self.sequences):
            for name, tensor in answers.taps(self._ask("taps", self._tokens(ids)), len(ids)).items():
                found[f"{i}/{name}"] = self._chosen(i, tensor[0]).cpu()
            self.progress(f"{self.dtype} taps", (i + 1) / len(self.sequences))
        return found

    def _chosen(self, sequence: int, tensor: Tensor) -> Tensor:
        return tensor if self.case.positions is None else tensor[self.case.positions[sequence]]

    def _extras(self) -> dict[str, Tensor]:
        by_length = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))
        chosen = by_length[:1] if self.large else list(dict.fromkeys((by_length[0], by_length[-1])))
        found: dict[str, Tensor] = {}
        steps = {"rerun": self._rerun, "batch": self._batch, "cached": self._cached, "chunked": self._chunked}
        steps |= {"packed": self._documents, "compiled": self._compiled}
        for kind, step in steps.items():
            self.progress(f"{self.dtype} {kind}", 1.0)
            check = "cache" if kind in CACHE_WAYS else "metamorphic"
            with self.out.step(kind, check, "G7", kind):
                found |= step(chosen)
        with self.out.step("greedy", "greedy", "G6"):
            self._greedy(chosen)
        return found

    def _keep(self, kind: str, sequence: int, positions: list[int], logits: Tensor) -> dict[str, Tensor]:
        """Logits (N, V) of another way to run a sequence: EXTRA_ROWS of its positions, fewer for EXTRA_LOGITS."""
        n = min(EXTRA_ROWS, len(positions), max(16, EXTRA_LOGITS // logits.shape[-1]))
        rows = torch.linspace(0, len(positions) - 1, n).int().tolist()
        positions, logits = [positions[row] for row in rows], logits[rows]
        self.out.extra.setdefault(kind, {})[str(sequence)] = positions
        return {f"{sequence}/logits@{kind}": logits.cpu()}

    def _lacks(self, kind: str, *methods: str) -> bool:
        """Whether the candidate lacks one of these; the first is said."""
        absent = [method for method in methods if method not in self.candidate.has]
        if absent:
            self.out.uncovered[kind] = self.candidate.lacks(absent[0])
        return bool(absent)

    def _rerun(self, chosen: list[int]) -> dict[str, Tensor]:
        tokens = self._tokens(self.sequences[chosen[0]])
        self.out.same["rerun"] = largest(self._call(tokens), self._call(tokens))
        return {}

    def _batch(self, chosen: list[int]) -> dict[str, Tensor]:
        """Every sequence cut to the shortest's length, as rows of one batch."""
        rows = list(range(min(4, len(self.sequences))))
        length = min(len(self.sequences[i]) for i in rows)
        if len(rows) < 2:
            self.out.uncovered["batch"] = "one sequence makes no batch"
            return {}
        tokens = torch.tensor([self.sequences[i][:length] for i in rows], device=self.case.device)
        logits = self._call(tokens)
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
        if self._lacks(kind, "prefill", "decode"):
            return {}
        found: dict[str, Tensor] = {}
        for i in chosen:
            ids = self.sequences[i]
            # A prompt without continuation is decoded from its middle on.
            start = first(i) if first(i) < len(ids) else max(1, len(ids) // 2)
            found |= self._keep(kind, i, *self._decode_on(ids, start, chunk(len(ids))))
        return found

    def _decode_on(self, ids: list[int], start: int, chunk: int) -> tuple[list[int], Tensor]:
        """Logits (N, V) of the positions that prefill and decode returned: all of a call's tokens, or its last."""
        positions: list[int] = []
        rows: list[Tensor] = []
        for begin in (0, *range(start, len(ids), chunk)):
            end = start if begin == 0 else min(begin + chunk, len(ids))
            logits = self._logits("prefill" if begin == 0 else "decode", self._tokens(ids[begin:end]), last=True)[0]
            positions += range(end - logits.shape[0], end)
            rows.append(logits)
        return positions, torch.cat(rows)

    def _documents(self, chosen: list[int]) -> dict[str, Tensor]:
        """Sequences packed in one row: each as if alone, and untouched, bit for bit, by a change of the first."""
        if self._lacks("packed", "packed"):
            return {}
        documents = self._that_fit(sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))[:DOCUMENTS])
        if self.large or len(documents) < 2:
            self.out.uncovered["packed"] = "packing is checked on small checkpoints with several sequences"
            return {}
        tokens = self._tokens([t for i in documents for t in self.sequences[i]])
        doc_ids = self._tokens([n for n, i in enumerate(documents) for _ in self.sequences[i]])
        logits = self._logits("packed", tokens, doc_ids)[0]
        changed, first = tokens.clone(), len(self.sequences[documents[0]])
        changed[:, :first] = changed[:, :first].flip(1)
        perturbed = self._logits("packed", changed, doc_ids)[0]
        self.out.same["another document changed"] = largest(logits[first:], perturbed[first:])
        found: dict[str, Tensor] = {}
        start = 0
        for i in documents:
            n = len(self.sequences[i])
            found |= self._keep("packed", i, list(range(n)), logits[start : start + n])
            start += n
        return found

    def _that_fit(self, documents: list[int]) -> list[int]:
        """As many of these sequences as fit into the context together."""
        kept: list[int] = []
        for i in documents:
            total = sum(len(self.sequences[j]) for j in (*kept, i))
            if self.case.context is None or total <= self.case.context:
                kept.append(i)
        return kept

    def _compiled(self, chosen: list[int]) -> dict[str, Tensor]:
        if self._lacks("compiled", "compiled"):
            return {}
        ids = self.sequences[chosen[0]]
        return self._keep("compiled", chosen[0], list(range(len(ids))), self._logits("compiled", self._tokens(ids))[0])

    def _greedy(self, chosen: list[int]) -> None:
        """The candidate's own greedy text after each prompt, through its cache where it has one."""
        generated: list[list[int]] = []
        for i, ids in enumerate(self.sequences):
            n = len(ids) - self.prompt_lengths[i] if i in chosen or not self.large else 0
            prompt = ids[: self.prompt_lengths[i]]
            generated.append(self._continue(prompt, n) if n > 0 else [])
            self.progress(f"{self.dtype} greedy", (i + 1) / len(self.sequences))
        self.out.generated = generated

    def _continue(self, prompt: list[int], n: int) -> list[int]:
        cached = "cached" in self.out.extra  # one that fails is said to, and does not fail this as well
        new: list[int] = []
        while len(new) < n:
            if not cached:
                logits = self._logits("__call__", self._tokens(prompt + new), last=self.last_only)
            elif not new:
                logits = self._logits("prefill", self._tokens(prompt), last=True)
            else:
                logits = self._logits("decode", self._tokens(new[-1:]), last=True)
            if torch.isnan(logits[0, -1]).any():
                raise Wrong(f"the logits that choose token {len(new)} of the greedy text hold NaN")
            new.append(int(logits[0, -1].argmax()))
        return new


def largest(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| as a float; NaN where either holds NaN or an infinity, which no bound lets pass."""
    if torch.equal(a, b):
        return 0.0 if answers.finite(a) else float("nan")
    return float((a.double() - b.double()).abs().max())
