"""The driver of a candidate that is run whole: the teacher-forced forward pass, its taps, and the other ways to the
same logits that its methods make possible (WAYS of candidates/interface.py); then greedy text.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.candidates import answers
from parity.candidates.crash import Wrong
from parity.candidates.interface import WAYS, Interface
from parity.contract import Case
from parity.run.recording import EXTRA_ROWS, Progress, Recording
from parity.trace import TraceWriter, by_part

CHUNKS = 8  # of a chunked prefill; their size is made odd, so that they never line up with a block size
DOCUMENTS = 3
EXTRA_LOGITS = 1 << 22  # of each other way to run a sequence, at most: numbers


def run_whole(candidate: Interface, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> Recording:
    return WholeRun(candidate, case, dtype, writer, progress).record()


class WholeRun:
    """One candidate at one dtype on one case. `sequences` are the teacher-forced token ids, prompts included."""

    def __init__(self, candidate: Interface, case: Case, dtype: str, writer: TraceWriter, progress: Progress) -> None:
        self.candidate, self.case, self.dtype, self.writer, self.progress = candidate, case, dtype, writer, progress
        assert case.prompts is not None
        self.sequences = case.prompts
        self.prompt_lengths = case.prompt_lengths or [len(p) for p in case.prompts]
        self.large = case.positions is not None
        self.vocab_size = case.vocab_size  # where the case does not say: of the first answer
        self.last_only = self.candidate.declared("last_only")
        self.choices: list[
            list[int]
        ] = []  # per sequence: the whole pass' token in place of each that follows the prompt
        self.out = Recording(dtype)

    def record(self) -> Recording:
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
        with self.out.count_seconds():
            return self.candidate.ask(method, *args)

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
            found[f"{i}/logits"] = logits = self._call(self._tokens(ids))[0].cpu()
            self.choices.append(logits[self.prompt_lengths[i] - 1 : -1].argmax(-1).tolist())
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
        for way in WAYS:
            self.progress(f"{self.dtype} {way.kind}", 1.0)
            if why := self.candidate.lacks_any(way.needs):
                self.out.uncovered[way.kind] = why
                continue
            with self.out.step(way.kind, way.check, "G7", way.kind):
                found |= steps[way.kind](chosen)
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
        ids = self.sequences[chosen[0]]
        return self._keep("compiled", chosen[0], list(range(len(ids))), self._logits("compiled", self._tokens(ids))[0])

    def _greedy(self, chosen: list[int]) -> None:
        """The candidate's own greedy text after each prompt, through its cache where it has one."""
        cached = "cached" in self.out.extra  # one that fails is said to, and does not fail this as well
        follow = self._decode_text if cached else self._draft_text
        self.out.generated = []
        for i in range(len(self.sequences)):
            self.out.generated.append(follow(i, chosen[0]) if i in chosen or not self.large else [])
            self.progress(f"{self.dtype} greedy", (i + 1) / len(self.sequences))

    def _decode_text(self, sequence: int, shortest: int) -> list[int]:
        """Prefill the prompt, then feed each chosen token."""
        ids, n = self.sequences[sequence], self.prompt_lengths[sequence]
        new: list[int] = []
        while len(new) < len(ids) - n:
            tokens = self._tokens(new[-1:] or ids[:n])
            new.append(self._choose("decode" if new else "prefill", tokens, len(new)))
        return new

    def _draft_text(self, sequence: int, shortest: int) -> list[int]:
        """Without a cache each token costs a pass over all before it, though a pass over the text that is asked for has
        chosen in place of each of its tokens. So a prefix is run where it may say something else: at every length of
        the shortest sequence, at the first and the last of another, and where the whole pass chose otherwise. A
        text ends where it leaves the one asked for, behind which nothing is judged.
        """
        ids, n = self.sequences[sequence], self.prompt_lengths[sequence]
        new: list[int] = []
        for step, (drafted, wanted) in enumerate(zip(self.choices[sequence], ids[n:], strict=True)):
            asked = sequence == shortest or step in (0, len(ids) - n - 1) or drafted != wanted
            new.append(self._choose("__call__", self._tokens(ids[: n + step]), step) if asked else drafted)
            if new[-1] != wanted:
                break
        return new

    def _choose(self, method: str, tokens: Tensor, step: int) -> int:
        logits = self._logits(method, tokens, last=method != "__call__" or self.last_only)
        if torch.isnan(logits[0, -1]).any():
            raise Wrong(f"the logits that choose token {step} of the greedy text hold NaN")
        return int(logits[0, -1].argmax())


def largest(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| as a float; NaN where either holds NaN or an infinity, which no bound lets pass."""
    if torch.equal(a, b):
        return 0.0 if answers.finite(a) else float("nan")
    return float((a.double() - b.double()).abs().max())
