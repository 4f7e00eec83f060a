"""Candidates that declare what they round: honest ones, one that rounds more than it says, one wrong besides."""

from typing import Any

from torch import Tensor

from mistaken_ports import base, by_rows, fp8, inputs, through, weights
from parity.mutants.edits.edit import Edit, Load, edited, override


def declaring(*edits: Edit, **conditions: str) -> Load:
    def edit(nano: Any) -> None:
        for one in edits:
            one(nano)
        for name, value in conditions.items():
            override(nano, name, value)

    return edited(edit)


def int8_blocks(x: Tensor) -> Tensor:
    return by_rows(x, 127, 32)


def half(x: Tensor) -> Tensor:
    return x.half().float()


Q8 = (weights(int8_blocks), inputs(int8_blocks))

fp8_cache = declaring(through(fp8), kv="fp8")
fp16_cache = declaring(through(half), kv="fp16")
fp16_queries_too = declaring(through(half, queries=True), kv="fp16")  # as llama.cpp's default
fp8_said_to_be_fp16 = declaring(through(fp8), kv="fp16")
q8 = declaring(*Q8, integers="int8/32", activations="int8/32")
q8_wrong_base = declaring(*Q8, base(1e4), integers="int8/32", activations="int8/32")
q8_fp16_cache = declaring(*Q8, through(half), integers="int8/32", activations="int8/32", kv="fp16")
unheard_of = declaring(kv="fp4")
