"""Teacher forcing: each operation of a candidate on the inputs that a reference recorded, so that no error can pile up.

The reference's trace is cut to a few short sequences (attention is causal, so the beginning of a trace is the trace of
the beginning), the candidate and the float64 oracle compute every operation from the same inputs, and the gate of
checks/ops.py compares their errors. `INPUTS` says which taps an operation is given.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.candidates import answers
from parity.candidates.interface import Interface
from parity.trace import Trace, TraceWriter, by_part
from reference.protocol import tap_names

CUT_LOGITS = 1 << 22  # numbers: a sequence is cut to so many logits, 32 positions of a Llama 3 vocabulary
CUT_TOKENS = 32  # but to no fewer: 4000 numbers a tap on the smallest shapes, enough for a stable ratio

# Operation -> the taps it is given; "in" is the residual stream before the block.
INPUTS: dict[str, tuple[str, ...]] = {
    "attn_norm": ("in",),
    "q": ("attn_norm",),
    "k": ("attn_norm",),
    "v": ("attn_norm",),
    "q_rope": ("q",),
    "k_rope": ("k",),
    "attn_mix": ("q_rope", "k_rope", "v"),
    "attn_out": ("attn_mix",),
    "ffn_norm": ("in", "attn_out"),  # of their sum, rounded to the run dtype
    "gate": ("ffn_norm",),
    "up": ("ffn_norm",),
    "ffn_mix": ("gate", "up"),
    "ffn_out": ("ffn_mix",),
    "out": ("in", "attn_out", "ffn_out"),
}


def op_inputs(name: str, n_layers: int) -> list[str]:
    """The taps, by their full names, that the operation `name` is given; none for the embedding, which is a look-up."""
    if not name.startswith("layers."):
        last = f"layers.{n_layers - 1}.out"
        return {"embed": [], "final_norm": [last], "logits": ["final_norm"]}[name]
    _, layer, tap = name.split(".")
    before = "embed" if layer == "0" else f"layers.{int(layer) - 1}.out"
    return [before if x == "in" else f"layers.{layer}.{x}" for x in INPUTS[tap]]


def op_names(n_layers: int) -> list[str]:
    return [name for name in tap_names(n_layers) if name != "embed"]


def cut(trace: Trace, dtypes: list[str], folder: Path) -> Trace:
    """The first positions of the shortest and the longest sequence of a trace, as a trace of its own."""
    by_length = sorted(range(len(trace.sequences)), key=lambda i: len(trace.sequences[i]))
    chosen = list(dict.fromkeys((by_length[0], by_length[-1])))
    n_tokens = max(CUT_TOKENS, CUT_LOGITS // trace.meta["config"]["vocab_size"])
    writer = TraceWriter(folder)
    for dtype in dtypes:
        taps = {
            f"{n}/{tap}": trace.get(dtype, i, tap)[:n_tokens]
            for n, i in enumerate(chosen)
            for tap in tap_names(trace.n_layers)
        }
        for part, tensors in by_part(taps):
            writer.part(dtype, part, tensors)
    sequences = [trace.sequences[i][:n_tokens] for i in chosen]
    writer.finish(_meta(trace, sequences, dtypes))
    return Trace(folder)


def record_ops(candidate: Interface, dtype: str, given: Trace, writer: TraceWriter, device: str) -> None:
    """The candidate's operations at one dtype on a cut trace's inputs; those it does not implement are left out."""
    found, said = dict[str, Tensor](), ""
    with torch.no_grad():
        for s in range(len(given.sequences)):
            for name in op_names(given.n_layers):
                taps = op_inputs(name, given.n_layers)
                inputs = {tap: given.get(dtype, s, tap).unsqueeze(0).to(device) for tap in taps}
                asked = f"ops({name}, inputs)"
                try:
                    out = answers.tap(candidate.ask("ops", name, inputs), asked, len(given.sequences[s]))
                except NotImplementedError as error:
                    said = said or str(error)
                    continue
                found[f"{s}/{name}"] = out[0].cpu()
    if not found:
        raise NotImplementedError(said or "the candidate's ops() does none of the operations")
    for part, tensors in by_part(found):
        writer.part(dtype, part, tensors)


def finish_ops(writer: TraceWriter, given: Trace, dtypes: list[str]) -> None:
    writer.finish(_meta(given, given.sequences, dtypes))


def _meta(trace: Trace, sequences: list[list[int]], dtypes: list[str]) -> dict[str, Any]:
    return {
        "implementation": trace.meta.get("implementation"),
        "config": trace.meta["config"],
        "sequences": sequences,
        "prompt_lengths": [len(s) for s in sequences],
        "positions": None,
        "dtypes": {dtype: dtype for dtype in dtypes},
        "seconds_forward": 0.0,
    }
