"""Open a checkpoint folder in Meta's or Hugging Face's format: the config, lazy weights by Meta names, notices.

Written apart from every other reader of these formats on purpose: it feeds the references, so that a reading error
elsewhere shows as a difference. Strict: what is missing, extra, misshapen or unknown is refused in one line.

    from reference.files import open_folder
    checkpoint = open_folder("Meta-Llama-3.1-8B")
    checkpoint.config["rope_scaling"]    # {'factor': 8.0, 'low_freq_factor': 1.0, ...}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanollama import gate
from nanollama.gate import documents
from reference.files.weights import Unusable, Weights, through_gate

Config = dict[
    str, Any
]  # dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size norm_eps rope_theta rope_scaling tied


@dataclass(frozen=True)
class Checkpoint:
    folder: Path  # the one that holds the weights (for hub copies of Meta's files: .../original)
    format: str  # "meta" or "hf"
    config: Config
    weights: Weights
    notices: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """Name of the output matrix."""
        return "tok_embeddings.weight" if self.config["tied"] else "output.weight"

    def bytes_at(self, dtype: torch.dtype) -> int:
        return self.weights.numel() * dtype.itemsize

    def find(self, *names: str) -> Path | None:
        """The first of these files in the folder, or in the `original` folder of a hub copy."""
        places = [self.folder / name for name in names] + [self.folder / "original" / name for name in names]
        return next((path for path in places if path.is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as strict as the gate is. Raises Unusable."""
    return through_gate(documents.read_json, path)


def number(values: dict[str, Any], key: str, path: Path, kind: type = int, default: Any = None) -> Any:
    """values[key] as a positive number, `default` (if there is one) where the key is absent or null."""
    value = values.get(key)
    if value is None:
        if default is None:
            raise Unusable(f"{path}: lacks the key {key!r}")
        return default
    whole = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not whole or not 0 < value < 2**63:
        raise Unusable(
            f"{path}: {key} should be a positive {'number' if kind is float else 'integer'}, not {gate.shown(value)}"
        )
    return kind(value)


def flag(values: dict[str, Any], key: str, path: Path) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise Unusable(f"{path}: {key} should be true or false, not {gate.shown(value)}")
    return bool(value)


def check_config(config: Config, path: Path) -> None:
    """The relations that every dense Llama keeps."""
    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    if heads % kv_heads:
        raise Unusable(f"{path}: {heads} heads cannot share {kv_heads} kv heads evenly")
    if config["head_dim"] % 2:
        raise Unusable(f"{path}: head_dim {config['head_dim']} is odd; rotary embedding needs pairs")
    if config["n_layers"] > 10_000:
        raise Unusable(f"{path}: {config['n_layers']} layers; no Llama has so many")


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every weight of the model by Meta name."""
    dim, hidden, vocab = config["dim"], config["hidden_dim"], config["vocab_size"]
    q_rows, kv_rows = (config[n] * config["head_dim"] for n in ("n_heads", "n_kv_heads"))
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for i in range(config["n_layers"]):
        shapes |= {
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.attention.wq.weight": (q_rows, dim),
            f"layers.{i}.attention.wk.weight": (kv_rows, dim),
            f"layers.{i}.attention.wv.weight": (kv_rows, dim),
            f"layers.{i}.attention.wo.weight": (dim, q_rows),
            f"layers.{i}.ffn_norm.weight": (dim,),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
        }
    shapes["norm.weight"] = (dim,)
    if not config["tied"]:
        shapes["output.weight"] = (vocab, dim)
    return shapes


def check_names(found: set[str], config: Config, where: Path) -> None:
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in found]:
        raise Unusable(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all); download the files again")
    if extra := sorted(found - set(expected)):
        raise Unusable(f"{where}: tensor {extra[0]} belongs to no dense Llama of this config ({len(extra)} in all)")


def check_weights(weights: Weights, config: Config, where: Path) -> None:
    """Names, shapes and dtypes, before any value is read."""
    check_names(set(weights), config, where)
    for name, shape in expected_shapes(config).items():
        if weights.shapes[name] != shape:
            raise Unusable(f"{where}: tensor {name} has shape {weights.shapes[name]}, the config asks for {shape}")
        if weights.dtypes[name] not in (torch.float32, torch.bfloat16, torch.float16):
            raise Unusable(
                f"{where}: tensor {name} is {weights.dtypes[name]}; only float32, bfloat16, float16 are read"
            )
