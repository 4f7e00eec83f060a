"""The plain port as a program that answers more than logits and taps, without saying shapes, and prints on stdout.

python -m parity.check --candidate "cmd:python tests/ports/wide_program.py {ckpt} {dtype} {answers}"
"""

import json
import sys
from pathlib import Path

import plain_port
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECLARED = {"integers": None, "max_positions": 300, "notices": ["a remark"]}


def write(file: str, tensor: Tensor) -> None:
    Path(file).write_bytes(tensor.float().contiguous().numpy().astype("<f4").tobytes())


class Program:
    """`spoilt` names a request that is answered wrongly."""

    def __init__(self, checkpoint: str, dtype: str, spoilt: str) -> None:
        self.port, self.spoilt = plain_port.load(checkpoint, DTYPES[dtype], "cpu"), spoilt
        self.past: list[int] = []

    def answer(self, word: str, *rest: str) -> str:
        if word == "can":
            return "ok logits batch prefill decode encode encode_chat declare"
        if word == "declare":
            return "ok " + json.dumps({k: v for k, v in DECLARED.items() if v})
        if word == "encode":
            return "ok 1 " + " ".join(str(b) for b in Path(rest[0]).read_bytes())
        if word == "encode_chat":
            return "no " + json.loads(Path(rest[0]).read_text())[0]["content"]
        file, *numbers = rest
        ids = [int(n) for n in numbers]
        if word == "batch":
            tokens = torch.tensor(ids[1:]).view(ids[0], -1)
        else:
            self.past = [*(self.past if word == "decode" and self.spoilt != "decode" else []), *ids]
            tokens = torch.tensor([self.past if word in ("prefill", "decode") else ids])
        logits = self.port(tokens)
        if word == self.spoilt == "batch":
            logits = logits.flip(0)
        write(file, logits[:, -len(ids) :] if word in ("prefill", "decode") else logits)
        return "ok"


def main(checkpoint: str, dtype: str, answers: str, spoilt: str = "") -> None:
    print("ok logits", flush=True)  # what libraries print is no answer
    program = Program(checkpoint, dtype, spoilt)
    with open(answers, "w") as replies:
        for line in sys.stdin:
            print("working ...", flush=True)
            print(program.answer(*line.split()), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
