"""adapter_config.json: which modules a LoRA of peft's changes, each with which rank and alpha.

Settings that leave formula and base alone are known by name; any other that is switched on is refused by name, since
an adapter applied without it is another model. Modules carry peft's names: model.layers.3.self_attn.q_proj.

    python -c "from nanollama.checkpoint.peft_config import read_config; print(read_config('DIR/adapter_config.json'))"
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from nanollama import gate
from nanollama.checkpoint.fields import Fields, read_json
from nanollama.checkpoint.weights import CheckpointError

# Values that switch nothing on; most other initialisations take the adapter's start out of the base (pissa, olora).
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
# What only describes files, the training (also of unsloth, axolotl, ms-swift), or switches that are off.
IDLE = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version")
    + ("qalora_group_size", "revision", "runtime_config", "task_type", "unsloth_fixed", "lora_dtype")
    + ("merge_weights", "loraplus_lr_ratio", "loraplus_lr_embedding", "lorap_lr_ratio", "lorap_emb_lr")
)
PATTERN_CHARACTERS = 4096  # of a regular expression; unsloth's longest has 500
PATTERNS_S = 2.0  # of CPU, for all that a config's expressions are asked
LLAMA = ("q_proj", "v_proj")  # peft's targets for a Llama where none are named


class Patterns:
    """A stranger's regular expressions, matched within a time that they share: `re` would backtrack for ever."""

    def __init__(self, path: Path) -> None:
        self.path, self.left_s = path, PATTERNS_S

    def match(self, pattern: str, text: str, *, whole: bool = False) -> Any:
        """What `re.match` or `re.fullmatch` gives. Raises CheckpointError where it takes too long."""
        began = time.process_time()
        try:
            return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=max(self.left_s, 1e-3))
        except TimeoutError:
            what = f"the regular expression {gate.shown(pattern)} takes more than {PATTERNS_S:g} s: write it plainer"
            raise CheckpointError(self.path, what) from None
        finally:
            self.left_s -= time.process_time() - began


@dataclass(frozen=True)
class PeftConfig:
    """One adapter's settings. `targets` and `excluded`: a regular expression, or a tuple of endings of names."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool  # the length of each row of the sum is stored, too
    ranks: dict[str, int]  # pattern of a module -> its rank, where it is another
    alphas: dict[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]  # none: all
    layer_lists: tuple[str, ...]  # patterns of what comes before a layer's number; none: anything
    whole: tuple[str, ...]  # endings of modules that are stored as they are
    rows: dict[str, tuple[int, ...]]  # module -> ids of the rows that are stored as they are
    patterns: Patterns = field(repr=False, compare=False)

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if self._fits(pattern, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """What is divided by the rank; rank-stabilised LoRA (arXiv 2312.03732) divides alpha by the rank's root."""
        alpha = next((alpha for pattern, alpha in self.alphas.items() if self._fits(pattern, module)), self.alpha)
        return alpha * math.sqrt(self.rank_of(module)) if self.rslora else alpha

    def changes(self, module: str) -> bool:
        """Whether the module has a lora_A and lora_B. Source: check_target_module_exists of peft."""
        kept = any(self.patterns.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.whole)
        if kept or self._named(self.excluded, module) or not self._named(self.targets, module):
            return False
        if not self.layers or isinstance(self.targets, str) or module in self.targets:
            return True
        lists = self.layer_lists or (r"[^.]*",)
        found = next(filter(None, (self.patterns.match(rf"(?:.*?\.)?{name}\.(\d+)\.", module) for name in lists)), None)
        return found is not None and int(found.group(1)) in self.layers

    def is_whole(self, module: str) -> bool:
        return module.endswith(self.whole)

    def rows_of(self, module: str) -> tuple[int, ...]:
        return next((ids for name, ids in self.rows.items() if self._named((name,), module)), ())

    def _fits(self, pattern: str, module: str) -> bool:
        return self.patterns.match(rf"(.*\.)?({pattern})$", module) is not None

    def _named(self, names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return self.patterns.match(names, module, whole=True) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)


def read_config(path: Path) -> PeftConfig:
    """Raises CheckpointError, one line, for a setting that is unknown or wrong."""
    found = {key: value for key, value in read_json(path).items() if value not in (None, "", [], {})}
    if "lora_parameters" in found or "fine_tune_type" in found:
        raise CheckpointError(path, "is of an adapter of mlx: fuse it into its base (mlx_lm.fuse), and open the result")
    fields = Fields(path, {"peft_type": "missing", **found})
    try:
        config = _taken(fields)
    except (re.error, regex.error, RecursionError) as error:
        pattern = gate.shown(getattr(error, "pattern", "one of its patterns"))
        raise CheckpointError(path, f"{pattern} is no regular expression ({gate.reason(error)}): mend it") from None
    try:
        fields.finish(IDLE)
    except CheckpointError as error:
        raise CheckpointError(str(error), "merge it into its base with peft and open the result") from None
    return config


def _taken(fields: Fields) -> PeftConfig:
    for key, plain in PLAIN.items():
        value = fields.take(key, plain[0])
        if value not in plain:
            wanted = " or ".join(repr(good) for good in plain)
            raise fields.error(
                key, f"is {gate.shown(value)}: of LoRA's kinds only {wanted} is read; merge it with peft"
            )
    targets = _names(fields, "target_modules", pattern=True) or LLAMA
    layers = fields.take("layers_to_transform", [])
    rows = fields.take("trainable_token_indices", {})
    by_module = rows if isinstance(rows, dict) else {"embed_tokens": rows}
    return PeftConfig(
        rank=fields.integer("r"),
        alpha=fields.number("lora_alpha"),
        rslora=fields.flag("use_rslora"),
        dora=fields.flag("use_dora"),
        ranks=_by_pattern(fields, "rank_pattern", Fields.integer),
        alphas=_by_pattern(fields, "alpha_pattern", Fields.number),
        targets=r".*_proj" if str(targets).lower() == "all-linear" else targets,
        excluded=_names(fields, "exclude_modules", pattern=True),
        layers=_numbers(fields, "layers_to_transform", layers if isinstance(layers, list) else [layers]),
        layer_lists=tuple(map(_regex, _names(fields, "layers_pattern"))),
        whole=tuple(map(_regex, _names(fields, "modules_to_save"))),
        rows={module: _numbers(fields, "trainable_token_indices", ids) for module, ids in by_module.items()},
        patterns=Patterns(fields.path),
    )


def _regex(pattern: str) -> str:
    """As peft would take it, which asks Python's own engine."""
    if len(pattern) > PATTERN_CHARACTERS:
        raise re.error(f"{len(pattern):,} characters", pattern)
    re.compile(pattern)
    regex.compile(pattern)
    return pattern


def _by_pattern(fields: Fields, key: str, read: Callable[[Fields, str], Any]) -> dict[str, Any]:
    found = fields.checked(key, {}, lambda value: type(value) is dict, "an object of patterns and numbers")
    inner = Fields(fields.path, found, f"{key}.")
    return {_regex(pattern): read(inner, pattern) for pattern in found}


def _names(fields: Fields, key: str, *, pattern: bool = False) -> str | tuple[str, ...]:
    """A list of names; one string is one name, or with `pattern` a regular expression."""
    is_names = lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
    value = fields.checked(key, [], lambda value: isinstance(value, str) or is_names(value), "names of modules")
    if isinstance(value, str):
        return _regex(value) if pattern else (value,)
    return tuple(value)


def _numbers(fields: Fields, key: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise fields.error(key, f"is {gate.shown(value)}: expected whole numbers from 0")
    return tuple(value)
