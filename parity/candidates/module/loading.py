"""Candidates `torch:FILE.py:Class` and `hf:FOLDER`, made from the class or the folder alone.

python -m parity.check --ckpt Llama-3.2-1B --candidate torch:model.py:Transformer
python -m parity.check --ckpt Llama-3.2-1B --candidate hf:my-converted-folder
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanollama.checkpoint import CheckpointError, open_checkpoint
from nanollama.model import ModelConfig, Transformer
from parity import outside
from parity.candidates.module import matching
from parity.candidates.module.calling import Caller
from parity.candidates.module.fields import constructed, default_dtype, positions
from parity.candidates.module.hooked import Hooks
from parity.candidates.nano.model import taps_of
from parity.contract import UsageError

PROBE = (1, 5, 2, 7, 3, 11, 4, 6)  # tokens by which readings are told apart
NEAR = 0.05  # of a reading's logits from the checkpoint's, relative: below, it computes the same function
Load = Callable[[str, torch.dtype, str], Any]


def module_loader(name: str) -> Load:
    """load(checkpoint, dtype, device) of "FILE.py:Class": a module, constructed and filled. Raises UsageError."""
    if ":" not in name:
        raise UsageError(f"candidate torch:{name}: expected torch:FILE.py:Class")
    try:
        kind = outside.imported(name)
    except outside.Unusable as error:
        raise UsageError(str(error)) from error

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Module:
        return Module(kind, checkpoint, dtype, device)

    return load


class Module:
    """A torch module with a checkpoint's weights: logits, and taps where its modules hold one weight each."""

    def __init__(self, kind: type[nn.Module], checkpoint: str, dtype: torch.dtype, device: str) -> None:
        opened = open_checkpoint(checkpoint)
        self.cfg, self.dtype, self.device = opened.config, dtype, device
        self.max_positions = positions(self.cfg)
        self.module = constructed(kind, self.cfg, dtype, device).eval()
        self.layout = matching.layout(self.module, self.cfg)
        self.module.to(device)  # tables keep their dtype
        self.caller = Caller(self.module, self.cfg.vocab_size, self.max_positions)
        tokens = torch.tensor([PROBE], device=device) % self.cfg.vocab_size
        with torch.no_grad():
            truth = Transformer.from_weights(self.cfg, opened.weights, dtype=dtype, device=device).eval()
            self.choice, off = self._chosen(opened.weights, tokens, truth(tokens))
            self.hooks = Hooks(self.module, self.layout, self.choice, self.cfg)
            self.unlike = self._unlike(tokens, taps_of(truth, tokens)) if off < NEAR else set[str]()
        self.notices = [*opened.notices, f"torch: weights are matched by name and shape; {self.choice.said()}"]
        self.notices += [f"torch: {self.caller.said}"] if self.caller.said else []

    def _chosen(self, weights: Any, tokens: Tensor, truth: Tensor) -> tuple[matching.Choice, float]:
        """The reading whose logits are nearest, and how near: a rotation's order and gate's place are not in names."""
        held = {name: weights[name] for name in weights}
        found: list[tuple[float, int, matching.Choice]] = []
        for n, choice in enumerate(matching.choices(self.layout, self.cfg)):
            self._fill(choice, held)
            if not found:
                self.caller.settle(tokens)
            off = float((self(tokens).double() - truth.double()).norm() / truth.double().norm())
            found.append((off if off == off else float("inf"), n, choice))
        off, last, best = min(found)[0], len(found) - 1, min(found)
        if best[1] != last:
            self._fill(best[2], held)
        return best[2], off

    def _fill(self, choice: matching.Choice, weights: Any) -> None:
        for name, value in matching.filled(choice, self.layout, weights, self.cfg):
            matching.put_(self.module, name, value, self.dtype, self.device)

    def _unlike(self, tokens: Tensor, theirs: dict[str, Tensor]) -> set[str]:
        """Taps of another meaning: of a module that computes the right logits, what departs is no tap of ours."""
        unlike = set()
        for name, mine in self._taps(tokens).items():
            other = theirs[name].double()
            if mine.shape != other.shape or not float((mine.double() - other).norm()) < NEAR * float(other.norm()):
                unlike.add(name)
        return unlike

    def __call__(self, tokens: Tensor) -> Tensor:
        with default_dtype(self.dtype):
            return self.caller(tokens)

    def taps(self, tokens: Tensor) -> dict[str, Tensor]:
        found = {name: x for name, x in self._taps(tokens).items() if name not in self.unlike}
        if not found:
            raise NotImplementedError("none of the module's modules holds one weight alone")
        return found

    def _taps(self, tokens: Tensor) -> dict[str, Tensor]:
        with self.hooks.recording():
            self(tokens)
        return self.hooks.taps(tokens.shape[1])


# --- transformers ----------------------------------------------------------------------------------------------------


def transformers_loader(folder: str) -> Load:
    """load(checkpoint, dtype, device) of a folder that transformers opens; "": the checkpoint itself."""
    if folder and not Path(folder).is_dir():
        raise UsageError(f"candidate hf:{folder}: no such folder; expected a Hugging Face folder")

    def load(checkpoint: str, dtype: torch.dtype, device: str) -> Folder:
        from transformers import AutoModelForCausalLM

        where = folder or checkpoint
        try:
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"candidate hf:{where}: transformers does not open it: {str(error).splitlines()[0]}"
            ) from error
        return Folder(model.to(device).eval(), checkpoint)

    return load


class Folder:
    """A model of transformers: logits, cache, and taps of what holds the checkpoint's weights."""

    def __init__(self, model: Any, checkpoint: str) -> None:
        self.model = model
        self.past: Any = None
        takes = inspect.signature(model.forward).parameters  # newer versions call the cache `cache`
        self.cache = "cache" if "cache" in takes else "past_key_values"
        self.hooks: Hooks | None = None
        self.notices: list[str] = []
        try:
            cfg = open_checkpoint(checkpoint).config
            self.hooks = _hooks(model, cfg)
        except (UsageError, CheckpointError) as error:
            self.notices = [f"hf: no taps: {error}"]

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def prefill(self, tokens: Tensor) -> Tensor:
        from transformers import DynamicCache

        self.past = DynamicCache()
        return self.decode(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=True, **{self.cache: self.past}).logits

    def taps(self, tokens: Tensor) -> dict[str, Tensor]:
        if self.hooks is None:
            raise NotImplementedError("the model's parameters are not the checkpoint's")
        with self.hooks.recording():
            self(tokens)
        return self.hooks.taps(tokens.shape[1])


def _hooks(model: nn.Module, cfg: ModelConfig) -> Hooks:
    layout = matching.layout(model, cfg)
    return Hooks(model, layout, next(c for c in matching.choices(layout, cfg) if c.half), cfg)
