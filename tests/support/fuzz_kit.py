"""A kit by hand, of one layer and numbers that mean nothing, to be changed; and a port that computed it.

kit_target(Path("kit")).attempt(data)      # None, or the line that refuses it
"""

from pathlib import Path
from typing import Any

import torch

from fuzz_target import Target
from mutators import mutate_json
from parity.kit.arrays import Gate, Kit, KitWriter
from parity.kit.check import report
from parity.kit.claims import shapes_of
from parity.report import terminal
from parity.synth.checkpoint import write_manifest
from reference.protocol import tap_names, tap_shape

CONFIG: dict[str, Any] = {
    "dim": 4, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 2, "hidden_dim": 6, "vocab_size": 5,
    "norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "tied": False,
}  # fmt: skip
LENGTHS = [3, 2]
TOKENS = sum(LENGTHS)
TABLE: dict[str, Any] = {
    "config": CONFIG, "sequences": LENGTHS, "dtypes": ["fp32"], "training": {"lr": 1e-3}, "references": ["meta"],
    "checkpoint": {"parameters": 100, "path": "x", "format": "meta"}, "environment": {"torch": "2"}, "errata": [],
    "notices": [], "decided_fraction": {"fp32": 1.0}, "float32_share": [0.1, "logits"],
    "noise_floor": [{"of": "meta", "against": "hf", "dtype": "fp32", "logits": 1.0, "tap": "logits", "taps": 1.0,
                     "rms_logits": 0.1, "gradients": None}],
}  # fmt: skip


def write_kit(folder: Path) -> Path:
    """The kit; beside it, in `port`, what a port wrote that is off in its last digits."""
    (folder / "port").mkdir(parents=True)
    writer, generator = KitWriter(folder), torch.Generator().manual_seed(0)
    for name, shape in shapes_of(CONFIG).items():
        writer.add(name, "weights.f32", torch.ones(shape), "a weight")
    writer.add("tokens", "inputs.i32", torch.arange(TOKENS), "tokens")
    for tap in tap_names(CONFIG["n_layers"]):
        exact = torch.randn(TOKENS, *tap_shape(CONFIG, tap), generator=generator).double()
        writer.add(tap, "expected.f64", exact, "a tap")
        (folder / "port" / f"{tap}.f32").write_bytes((exact * 1.001).float().numpy().tobytes())
        writer.gates.append(Gate(tap, "fp32", "taps", "G3", "rms", "rms", "x noise", 0, TOKENS, 1e-3, 2.0))
    writer.add("best", "inputs.i32", exact.argmax(-1), "best")
    writer.add("decided.fp32", "inputs.i32", torch.ones(TOKENS), "decided")
    writer.gates.append(Gate("logits", "fp32", "kl", "G5", "kl_mean", "KL mean", "x noise", 0, TOKENS, 1e-3, 2.0))
    writer.gates.append(Gate("logits", "fp32", "argmax", "G6", "tokens", "tokens", "tokens", 0, TOKENS, 1.0, 0.0))
    writer.finish(TABLE)
    write_manifest(folder)
    return folder


def kit_target(folder: Path) -> Target:
    write_kit(folder)
    port = folder.with_name("port")
    (folder / "port").rename(port)

    def judge() -> None:
        (folder / "SHA256SUMS").unlink()
        write_manifest(folder)  # who changes a kit changes its sums
        found = report(Kit(folder), port, "fp32")
        assert terminal.render(found) and found.as_json()

    return Target(folder / "kit.json", mutate_json, judge)
