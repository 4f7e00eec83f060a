"""What is fuzzed of weights: every format of a checkpoint, by our readers and by the references', and adapters.

weight_targets(Path("work"))["pth"].attempt(data)      # None, or the line that refuses it
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import reference_checkpoints as theirs
from checkpoint_cases import LLAMA31, make_weights, write
from fuzz_target import Target
from mutators import Rng, mutate_gguf, mutate_json, mutate_safetensors
from mutators_pickle import mutate_zip
from mutators_text import mutate_bin
from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.adapter import Adapter, read_adapter, target_names, write_adapter
from nanollama.checkpoint.names import weight_shapes
from nanollama.model import ModelConfig
from reference.files import open_folder

TINY = replace(LLAMA31, dim=8, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=6, hidden_dim=12, n_layers=1)
TINY_C = replace(TINY, rope_scaling=None, rope_theta=10_000.0, norm_eps=1e-5, max_seq_len=4)
BLOCKS = replace(TINY, dim=32, head_dim=16, hidden_dim=32)
ARGUMENTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len")


def read_all(path: Path) -> None:
    """Ours: the config, and every number of every weight."""
    opened = open_checkpoint(path)
    for name in opened.weights:
        assert tuple(opened.weights[name].float().shape) == opened.weights.shapes[name]
        opened.weights.rows(name, 1, 2)


def read_all_theirs(path: Path) -> None:
    weights = open_folder(path).weights
    for name in weights:
        weights[name].float().sum()


def files_of(root: Path) -> dict[str, tuple[Path, Path, Callable[[bytes, Rng], bytes]]]:
    """By reader: what is opened, the file that is changed, and how."""
    folder = lambda name: root / name.replace(" ", "_")
    meta, hf = (partial(write, format=kind, config=TINY, weights=make_weights(TINY)) for kind in ("meta", "hf"))
    weights_c = make_weights(TINY_C, torch.float32)
    pt = root / "x.pt"
    torch.save({"model": weights_c, "model_args": {k: getattr(TINY_C, k) for k in ARGUMENTS}, "iter_num": 1}, pt)
    found: dict[str, tuple[Path, Path, Any]] = {"pt": (pt, pt, mutate_zip)}
    for name, make, file, change in (
        ("pth", meta, "consolidated.00.pth", mutate_zip),
        ("params.json", meta, "params.json", mutate_json),
        ("safetensors", hf, "model.safetensors", mutate_safetensors),
        ("config.json", hf, "config.json", mutate_json),
    ):
        path = make(folder(name))
        found[name] = (path, path / file, change)
    sharded = hf(folder("index"), max_shard_bytes=300)
    found["index"] = (sharded, sharded / "model.safetensors.index.json", mutate_json)
    sharded = hf(folder("shard"), max_shard_bytes=300)
    found["shard of an index"] = (sharded, min(sharded.glob("*.safetensors")), mutate_safetensors)
    for name, config, options in (("gguf", TINY, {}), ("gguf q4_1", BLOCKS, {"dtype": "q4_1"})):
        path = write(folder(name), "gguf", config, make_weights(config), **options)
        found[name] = (path, path, mutate_gguf)
    for version, head in ((0, 0), (1, 8), (2, 8)):
        path = write(folder(f"bin{version}"), "llama2c", TINY_C, weights_c, version=version)
        found[f"bin v{version}"] = (path, path, partial(mutate_bin, at=head))
    return found


def their_files(root: Path) -> dict[str, tuple[Path, Path, Callable[[bytes, Rng], bytes]]]:
    """The same for the references' readers, which open Meta's and Hugging Face's folders."""
    shape = theirs.Shape(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=6, head_dim=4)
    makers = {"pth": theirs.write_meta, "params.json": theirs.write_meta}
    makers |= {"safetensors": theirs.write_hf, "config.json": theirs.write_hf}
    names = {"pth": "consolidated.00.pth", "safetensors": "model.safetensors"}
    changes: dict[str, Any] = {"pth": mutate_zip, "safetensors": mutate_safetensors}
    found = {}
    for name, make in makers.items():
        path = make(root / "theirs" / name, shape, theirs.make_weights(shape))
        file = path / names.get(name, name)
        found[f"reference: {name}"] = (path, file, changes.get(name, mutate_json))
    path = write(root / "theirs" / "index", "hf", TINY, make_weights(TINY), max_shard_bytes=300)
    found["reference: index"] = (path, path / "model.safetensors.index.json", mutate_json)
    return found


def adapter(folder: Path, config: ModelConfig) -> Path:
    """Of rank 2, for every wq and wv."""
    shapes, names = weight_shapes(config), target_names(config, ("wq", "wv"))
    pairs = {name: (torch.ones(2, shapes[name][1]), torch.ones(shapes[name][0], 2)) for name in names}
    write_adapter(folder, Adapter(pairs, dict.fromkeys(names, 4.0)), config, base="BASE")
    return folder


def adapters(root: Path) -> dict[str, tuple[Path, Path, Callable[[bytes, Rng], bytes]]]:
    names = {"settings": "adapter_config.json", "tensors": "adapter_model.safetensors"}
    changes: dict[str, Any] = {"settings": mutate_json, "tensors": mutate_safetensors}
    found = {}
    for name, file in names.items():
        folder = adapter(root / f"adapter_{name}", TINY)
        found[f"adapter's {name}"] = (folder, folder / file, changes[name])
    folder = adapter(root / "adapter_pickle", TINY)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    found["adapter's pickle"] = (folder, folder / "adapter_model.bin", mutate_zip)
    return found


def weight_targets(root: Path) -> dict[str, Target]:
    """By reader."""
    root.mkdir(parents=True, exist_ok=True)
    opened = {name: (*of, partial(read_all, of[0])) for name, of in files_of(root).items()}
    opened |= {name: (*of, partial(read_all_theirs, of[0])) for name, of in their_files(root).items()}
    opened |= {name: (*of, partial(read_adapter, of[0], TINY)) for name, of in adapters(root).items()}
    return {name: Target(file, change, read) for name, (_, file, change, read) in opened.items()}
