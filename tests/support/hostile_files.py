"""Hostile configurations, indexes and weights of a folder, and the table of all kinds (see hostile.py)."""

import json
from pathlib import Path
from typing import Any

from hostile import Hostile, Make, link, pipe
from hostile_pth import PTH


def json_text(name: str, text: str) -> Make:
    return lambda folder: (folder / name).write_text(text)


def json_keys(name: str, **changes: Any) -> Make:
    def edit(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return edit


def json_cases(format: str, name: str, key: str) -> dict[str, Hostile]:
    """What any configuration file may be in place of one."""
    found: dict[str, tuple[Make, str]] = {
        "a list": (json_text(name, "[]"), "holds a JSON list"),
        "empty": (json_text(name, ""), "is empty"),
        "10^5 deep": (json_text(name, '{"a":' * 100_000), "nested more than"),
        "30 deep": (json_text(name, '{"a":' * 30 + "1" + "}" * 30), "nested more than"),
        "a key twice": (json_text(name, f'{{"{key}": 1, "{key}": 2}}'), "stands there twice"),
        "NaN": (json_text(name, f'{{"{key}": NaN}}'), "not a JSON number"),
        "infinity by a number": (json_text(name, f'{{"{key}": 1e999}}'), "beyond 64 bits"),
        "a number of 10^5 digits": (json_text(name, f'{{"{key}": {"9" * 100_000}}}'), "64 bits"),
        "not UTF-8": (lambda f: (f / name).write_bytes(b'{"a": "\xff"}'), "is not JSON"),
        "a text for a number": (json_keys(name, **{key: "64"}), f"{key} "),
        "a value of a megabyte for a number": (json_keys(name, **{key: "x" * 1_000_000}), f"{key} |more than"),
        "2^62 for a number": (json_keys(name, **{key: 2**62}), f"{key} |multiple|shape|layers|asks|Layers|heads"),
        "an unknown key with a megabyte": (json_keys(name, attention_ghost=["y" * 900_000]), "ghost"),
        "60,000 unknown keys": (json_keys(name, **{f"rope_ghost_{i}": 1 for i in range(60_000)}), "ghost|more than"),
        "5 MB": (lambda f: (f / name).write_text('{"a": "' + "z" * 5_000_000 + '"}'), "which no file of this kind has"),
        "a pipe": (lambda f: pipe(f / name), "is a pipe"),
        "an endless device": (lambda f: link(f / name, "/dev/zero"), "is a device"),
        "a link out of its folder": (lambda f: link(f / name, "/etc/passwd"), "link out of its folder"),
        "a link to itself": (lambda f: link(f / name, name), "leads nowhere"),
    }
    return {f"{name} {kind}": Hostile(format, make, part) for kind, (make, part) in found.items()}


JSON = json_cases("meta", "params.json", "dim") | json_cases("hf", "config.json", "hidden_size")


def index_of(weight_map: Any) -> Make:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def dtype(name: str) -> Make:
    """Of the first tensor of safetensors, in its header."""

    def edit(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        next(tensor for name, tensor in header.items() if name != "__metadata__")["dtype"] = name
        written = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(written).to_bytes(8, "little") + written + data[8 + size :])

    return edit


INDEX: dict[str, Hostile] = {
    "an index that is a list": Hostile("hf", index_of([]), "weight_map"),
    "an index of numbers": Hostile("hf", index_of({"a": 1}), "weight_map"),
    "an index that leads out": Hostile(
        "hf", index_of({"a": "../../x.safetensors"}), "outside of the folder", "leads out"
    ),
    "an index of an absolute path": Hostile("hf", index_of({"a": "/etc/passwd"}), "outside of the folder", "leads out"),
    "an index of a name with a zero byte": Hostile(
        "hf", index_of({"a": "x\0.safetensors"}), "no file's name", "is none"
    ),
    "an index of half a character": Hostile("hf", index_of({"a": "\ud800"}), "no file's name", "is none"),
    "an index of a name of 70,000 letters": Hostile("hf", index_of({"a": "x" * 70_000}), "no file's name", "is none"),
    "a dtype of 70,000 letters": Hostile("hf", dtype("a" * 70_000), "is truncated or not", "not a readable"),
    "weights that are a pipe": Hostile("hf", lambda f: pipe(f / "model.safetensors"), "is a pipe|is missing"),
    "weights that are a device": Hostile(
        "hf", lambda f: link(f / "model.safetensors", "/dev/zero"), "is a device|is missing"
    ),
}

FILES = PTH | JSON | INDEX
