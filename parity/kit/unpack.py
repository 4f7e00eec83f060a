"""A kit as files that existing programs open: checkpoints in three formats, and states in the manner of llm.c.

    python -m parity.kit --unpack kits/llama2 --out llama2      # prints: model.bin    llama2/model.bin ...

FOLDER/hf and FOLDER/meta    the weights in float32, as transformers and Meta's code open them
FOLDER/model.bin             the same as llama2.c's run.c maps it; only where theta is 10,000, eps 1e-5, no scaling
FOLDER/state.N.bin           of sequence N: 256 int32 (magic, version, B = 1, T), x and y (T) int32, logits (T, V)
                             float32, the mean loss float32; y of the last token is -100: ignored
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from parity.candidates.nano.folder import write_each
from parity.kit.arrays import Kit
from parity.run.training import IGNORED

MAGIC, VERSION, HEADER = 20240327, 2, 256  # those of llm.c's debug states


def unpack(kit: Kit, out: Path) -> Iterator[str]:
    """Write what a program may open into an empty folder; a line for each."""
    weights = {name: kit.get(name) for name, array in kit.arrays.items() if array.file == "weights.f32"}
    lengths = kit.table["sequences"]
    for name, lacking in write_each(out, kit.table["config"], weights, max(lengths)).items():
        yield f"{name:<12} " + (f"not written: {lacking}" if lacking else "weights in float32")
    tokens, logits, losses = kit.get("tokens"), kit.get("logits"), list[float]()
    for n, (begin, end) in enumerate(zip(kit.starts, kit.starts[1:], strict=False)):
        data, loss = state(tokens[begin:end], logits[begin:end])
        (out / f"state.{n}.bin").write_bytes(data)
        losses.append(loss)
    many = f"state.0.bin to state.{len(lengths) - 1}.bin" if len(lengths) > 1 else "state.0.bin"
    yield f"{'states':<12} {many}: tokens, labels, logits and loss ({', '.join(f'{x:.4f}' for x in losses)} nats)"


def state(tokens: Tensor, logits: Tensor) -> tuple[bytes, float]:
    """The file of one sequence, (T) int32 and (T, V) float64; its loss in nats, 0 where there is no label."""
    labels = torch.cat([tokens[1:], torch.tensor([IGNORED], dtype=torch.int32)])
    nats = logits.logsumexp(-1) - logits.gather(1, labels.clamp_min(0).long()[:, None])[:, 0]
    loss = float(nats[:-1].mean()) if len(tokens) > 1 else 0.0
    header = struct.pack("<4i", MAGIC, VERSION, 1, len(tokens)).ljust(4 * HEADER, b"\0")
    parts = [tokens.numpy().astype("<i4"), labels.numpy().astype("<i4"), logits.numpy().astype("<f4")]
    return header + b"".join(part.tobytes() for part in parts) + struct.pack("<f", loss), loss
