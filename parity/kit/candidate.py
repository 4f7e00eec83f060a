"""A candidate's answers to a kit, written as a port would write them: NAME.f32 files that kit_check judges.

    python -m parity.kit --check kit --candidate my_port.py:load        # seconds: no reference runs

The candidate is loaded in this process, from a checkpoint folder made of the kit's own weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.candidates import answers, resolve
from parity.candidates.crash import Crashed, Wrong, failure, results_of
from parity.candidates.interface import Interface, loaded, refuse_undeclared
from parity.candidates.nano.folder import write_folders
from parity.contract import Result, Status, UsageError
from parity.kit.arrays import Kit


class Answers:
    """Asks a candidate for what a kit expects; `results` holds what went wrong, `notices` what is ignored."""

    def __init__(self, kit: Kit, dtype: str, out: Path) -> None:
        if dtype not in kit.table["dtypes"]:
            known = ", ".join(kit.table["dtypes"])
            raise UsageError(f"--dtype {dtype}: the kit has bounds for {known}; make one with --dtype")
        self.kit, self.dtype, self.out = kit, dtype, out
        self.results: list[Result] = []
        self.notices: list[str] = []
        tokens = kit.get("tokens").long()
        self.sequences = [tokens[a:b].unsqueeze(0) for a, b in zip(kit.starts, kit.starts[1:], strict=False)]

    def write(self, name: str, folder: Path) -> None:
        """Everything that the candidate `name` has. Raises UsageError."""
        config = self.kit.table["config"]
        held = {n: self.kit.get(n) for n, array in self.kit.arrays.items() if array.file == "weights.f32"}
        folders = write_folders(folder / "checkpoint", config, held)
        load = next(iter(resolve(name).values()))
        self._step("logits", "G3", lambda: self._ask(self._loaded(load, folders)))

    def _loaded(self, load: Any, folders: list[Path]) -> Interface:
        refuse_undeclared(load, self.dtype)
        try:
            candidate = loaded(load, str(folders[0]), self.dtype, "cpu")
        except UsageError:
            candidate = loaded(load, str(folders[-1]), self.dtype, "cpu")
        refuse_undeclared(candidate.target, self.dtype)
        self.notices += [*candidate.declared("notices"), *candidate.notices]
        if "__call__" not in candidate.has or candidate.conditions:
            raise UsageError("a kit judges logits in floating point: use python -m parity.check for this candidate")
        return candidate

    def _ask(self, candidate: Interface) -> None:
        with torch.no_grad():
            self._step("logits", "G3", lambda: self._logits(candidate))
            steps = {"taps": ("G3", self._taps), "rope": ("G1", self._rope)}
            for method, (gate, step) in steps.items():
                if method in candidate.has:
                    self._step(method, gate, lambda step=step: step(candidate))  # type: ignore[misc]
        if "loss_and_grads" in candidate.has and "train.loss" in self.kit.arrays and self.dtype == "fp32":
            self._step("training", "G8", lambda: self._training(candidate))

    def _step(self, check: str, gate: str, step: Callable[[], None]) -> None:
        try:
            step()
        except NotImplementedError as error:
            reason = f"not covered: {str(error).splitlines()[0] if str(error) else 'the candidate cannot do this'}"
            skip = Result(check, gate, Status.SKIP, dtype=self.dtype, reason=reason, required=False)
            self.results.append(skip)
        except (Crashed, Wrong) as error:
            self.results += results_of(None, {"failures": [failure(error, check, gate, self.dtype).as_json()]})

    def _logits(self, candidate: Interface) -> None:
        asked, size, rows = candidate.row("__call__").signature, self.kit.table["config"]["vocab_size"], list[Tensor]()
        for tokens in self.sequences:
            ends = range(1, tokens.shape[1] + 1) if candidate.declared("last_only") else [tokens.shape[1]]
            for end in ends:
                out = candidate.ask("__call__", tokens[:, :end])
                rows.append(answers.logits(out, asked, 1, end, size, candidate.declared("last_only"))[0])
        self._keep("logits", torch.cat(rows))

    def _taps(self, candidate: Interface) -> None:
        found = [answers.taps(candidate.ask("taps", tokens), tokens.shape[1]) for tokens in self.sequences]
        for name in found[0]:
            if all(name in taps for taps in found) and self._name(name) in self.kit.arrays:
                self._keep(name, torch.cat([taps[name][0] for taps in found]))

    def _rope(self, candidate: Interface) -> None:
        positions = self.kit.get("rope.positions").long()
        cos, sin = answers.rope(candidate.ask("rope", positions), len(positions))
        self._keep("rope.cos", cos)
        self._keep("rope.sin", sin)

    def _training(self, candidate: Interface) -> None:
        tokens, targets = (self.kit.get(f"train.{name}")[0].long() for name in ("tokens", "targets"))
        out = candidate.ask("loss_and_grads", tokens, targets)
        loss, grads = answers.loss_and_grads(out, candidate.row("loss_and_grads").signature)
        self._keep("train.loss", torch.tensor([loss]))
        for name, gradient in grads.items():
            if f"grad.{name}" in self.kit.arrays:
                self._keep(f"grad.{name}", gradient)

    def _name(self, plain: str) -> str:
        own = f"{self.dtype}.{plain}"
        return own if own in self.kit.arrays else plain

    def _keep(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().float().cpu().contiguous().numpy().astype("<f4")
        (self.out / f"{self._name(name)}.f32").write_bytes(data.tobytes())
