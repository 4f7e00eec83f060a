"""A model's constructor, filled from a checkpoint's config by the names that this field gives its numbers.

    model = construct(Transformer, config, torch.float32, "cpu")

The one argument of a constructor may be a config object (a class of the same file, or the annotation's), a dict, or the
numbers themselves may be keyword arguments. What has a default and a name that is not known here keeps its default.
"""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from parity.candidates.nano.opening import ModelConfig
from parity.contract import UsageError
from parity.outside import kind_of

POSITIONS = 2048  # that a module is built for, unless the checkpoint has fewer
ROWS = 4  # the largest batch that is asked

NAMES: dict[str, tuple[str, ...]] = {
    "dim": ("dim", "d_model", "hidden_size", "n_embd", "emb_dim", "embed_dim", "model_dim", "embedding_dim"),
    "n_layers": ("n_layers", "n_layer", "num_layers", "num_hidden_layers", "depth"),
    "n_heads": ("n_heads", "n_head", "num_heads", "num_attention_heads", "n_query_heads"),
    "n_kv_heads": ("n_kv_heads", "n_kv_head", "num_kv_heads", "num_key_value_heads", "n_local_heads", "n_kv_groups",
                   "num_kv_groups", "n_query_groups"),
    "head_dim": ("head_dim", "head_size", "d_head"),
    "hidden_dim": ("hidden_dim", "intermediate_size", "intermediate_dim", "ffn_dim", "ffn_hidden_dim", "d_ff", "d_mlp"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "n_vocab", "d_vocab"),
    "norm_eps": ("norm_eps", "rms_norm_eps", "rms_eps", "eps"),
    "rope_theta": ("rope_theta", "rope_base", "theta", "theta_base", "rotary_base"),
    "positions": ("max_seq_len", "max_seq_length", "block_size", "context_length", "max_position_embeddings", "n_ctx",
                  "seq_len", "max_length"),
    "rows": ("max_batch_size", "max_gen_batch_size", "batch_size"),
    "scaling": ("rope_scaling", "rope_freq", "rope_adjustments", "freq_config"),
    "scaled": ("use_scaled_rope", "use_scaled"),
    "factor": ("rope_scaling_factor", "scale_factor"),
    "tied": ("tie_word_embeddings", "tied", "tied_embeddings", "weight_tying", "tie_weights"),
    "multiple_of": ("multiple_of",),
    "multiplier": ("ffn_dim_multiplier",),
    "dropout": ("dropout", "attn_dropout", "resid_dropout"),
    "bias": ("bias", "qkv_bias", "attention_bias", "mlp_bias"),
    "dtype": ("dtype",),
    "device": ("device",),
}  # fmt: skip
MEANING = {name: meaning for meaning, names in NAMES.items() for name in names}


def positions(config: ModelConfig) -> int:
    return min(config.max_seq_len, POSITIONS)


def values(config: ModelConfig, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """By every name of the table."""
    scaling = config.rope_scaling
    found: dict[str, Any] = {n: getattr(config, n) for n in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim")}
    found |= {name: getattr(config, name) for name in ("hidden_dim", "vocab_size", "norm_eps", "rope_theta", "tied")}
    found |= {"positions": positions(config), "rows": ROWS, "dtype": dtype, "device": device}
    found |= {"scaled": scaling is not None, "factor": scaling.factor if scaling else 1.0, "scaling": None}
    found |= {"dropout": 0.0, "bias": False}
    if scaling:
        context = dict.fromkeys(
            ("original_max_position_embeddings", "original_context_length", "original_max_seq_len", "original_context"),
            scaling.original_context,
        )
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        found["scaling"] = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": low,
                            "high_freq_factor": high, **context}  # fmt: skip
    # Meta's arithmetic for the hidden size, int(multiplier * int(8/3 dim)) rounded up to a multiple, turned round.
    plain = int(2 * 4 * config.dim / 3)
    found |= {"multiple_of": 1, "multiplier": (config.hidden_dim + 0.5) / plain}
    return {name: found[meaning] for name, meaning in MEANING.items()}


class Settings(dict):
    """A config that is asked for its numbers by any name, as a dict or as an object; what no checkpoint says is as the
    config classes of the same file have it."""

    def __init__(self, known: dict[str, Any], classes: list[type]) -> None:
        super().__init__(known)
        self.__dict__["_classes"] = classes

    def __missing__(self, name: str) -> Any:
        for kind in self.__dict__["_classes"]:
            if hasattr(kind, name):
                return getattr(kind, name)
        raise UsageError(f"torch: the module's config is asked for {name!r}, which no checkpoint says")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:
        return dict.get(self, name, default)


def construct(kind: type[nn.Module], config: ModelConfig, dtype: torch.dtype, device: str) -> nn.Module:
    """An instance of `kind`, parameters as it makes them. Raises UsageError for what cannot be filled in."""
    known = values(config, dtype, device)
    arguments = _arguments(kind, known)
    with default_dtype(dtype):  # as its own script would: caches made by plain torch.zeros take it
        made: Any = kind(**arguments)
    if not isinstance(made, nn.Module):
        raise UsageError(f"torch: {kind.__name__} makes {kind_of(made)}, no torch module")
    return made


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(was)


def _arguments(kind: type[nn.Module], known: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for p in inspect.signature(kind).parameters.values() if p.kind not in (p.VAR_POSITIONAL,)]
    filled = {p.name: known[p.name] for p in parameters if p.name in known}
    left = [p for p in parameters if p.name not in known and p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if not left:
        return filled
    if len(left) > 1:
        names = ", ".join(p.name for p in left)
        raise UsageError(f"torch: {kind.__name__} takes {names}, which no checkpoint says; write a load() for it")
    chosen, classes = _config_classes(kind, left[0])
    return filled | {left[0].name: Settings(known, classes) if chosen is None else _config(chosen, known)}


def _config_classes(kind: type[nn.Module], parameter: inspect.Parameter) -> tuple[type | None, list[type]]:
    """The class of a config argument, where it is annotated; and those of the same file that are called so."""
    module = sys.modules[kind.__module__]
    said = parameter.annotation
    if isinstance(said, str):
        said = getattr(module, said.split(".")[-1], None)
    words = ("config", "args", "params", "hparams")
    found = [x for name, x in vars(module).items() if isinstance(x, type) and name.lower().endswith(words)]
    own = isinstance(said, type) and said not in (dict, object, inspect.Parameter.empty)
    return (said if own else None), found


def _config(kind: type, known: dict[str, Any]) -> Any:
    """A config object; its fields are its constructor's parameters or, where that takes any, its annotations."""
    parameters = inspect.signature(kind).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = list(getattr(kind, "__annotations__", {})) if takes_any else [p.name for p in parameters]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    unknown = [name for name in required if name not in known]
    if unknown:
        raise UsageError(f"torch: {kind.__name__} needs {', '.join(unknown)}, which no checkpoint says; write a load()")
    filled = {name: known[name] for name in names if name in known}
    if any(MEANING[name] == "hidden_dim" for name in filled):
        filled = {name: value for name, value in filled.items() if MEANING[name] not in ("multiple_of", "multiplier")}
    elif not any(MEANING[name] == "multiplier" for name in filled) and "multiple_of" in filled:
        filled["multiple_of"] = known["hidden_dim"]  # the next multiple is the size itself
    try:
        return kind(**filled)
    except TypeError:
        if not dataclasses.is_dataclass(kind):
            raise
        init = {f.name for f in dataclasses.fields(kind) if f.init}
        return kind(**{name: value for name, value in filled.items() if name in init})
