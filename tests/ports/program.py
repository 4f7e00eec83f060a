"""The plain port as a program of its own, and ways in which a program can fail.

python -m parity.check --candidate "cmd:python tests/ports/program.py {ckpt} {dtype} load"
"""

import sys
from pathlib import Path

import plain_port
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write(file: Path, tensor: Tensor) -> None:
    """(1, T, ...) as little-endian float32."""
    file.write_bytes(tensor[0].float().contiguous().numpy().astype("<f4").tobytes())


def answer(port: plain_port.Port, request: str) -> str:
    word, where, *ids = request.split() if " " in request else (request, "")
    tokens = torch.tensor([[int(i) for i in ids]])
    if word == "can":
        return "ok logits taps"
    if word == "logits":
        write(Path(where), port(tokens))
    if word == "taps":
        for name, tensor in port.taps(tokens).items():
            write(Path(where) / f"{name}.f32", tensor)
    return "ok"


def main(checkpoint: str, dtype: str, kind: str) -> None:
    port = getattr(plain_port, kind if hasattr(plain_port, kind) else "load")(checkpoint, DTYPES[dtype], "cpu")
    for line in sys.stdin:
        request = line.strip()
        said = answer(port, request)
        if kind == "mute" and request == "can":
            said = "hello"
        elif kind == "few" and request == "can":
            said = "ok logits"
        elif request.startswith("logits") and kind == "dies":
            sys.exit("out of registers")
        elif request.startswith("logits") and kind == "declines":
            said = "error prompt too long"
        elif request.startswith("logits") and kind == "short":
            Path(request.split()[1]).write_bytes(b"\0" * 10)
        elif request.startswith("logits") and kind == "empty":
            Path(request.split()[1]).write_bytes(b"")
        elif request.startswith("logits") and kind == "forgets":
            Path(request.split()[1]).unlink()
        print(said, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
