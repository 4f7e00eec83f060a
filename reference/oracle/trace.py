"""Another implementation's trace, read as inputs for the oracle's operations.

other = OtherTrace(Path("out/meta"), "bf16", sequences)
other.layer_inputs(0)("attn_norm")      # (N, dim) float64, all sequences one after another
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reference.files import read_json
from reference.files.weights import Unusable
from reference.protocol import TRACE_SCHEMA, tap_part


class OtherTrace:
    """The taps of one run dtype."""

    def __init__(self, folder: Path, dtype: str, sequences: list[list[int]]):
        record = _trace_json(folder)
        if record.get("positions") is not None:
            raise Unusable(f"{folder}: keeps taps at some positions only; record all of them for --ops")
        if dtype not in record["dtypes"]:
            raise Unusable(f"{folder}: was not run in {dtype}, only in {', '.join(record['dtypes'])}")
        self.folder, self.n_layers = folder / record["dtypes"][dtype], record["config"]["n_layers"]
        self.count = len(sequences)

    @staticmethod
    def sequences(folder: Path) -> list[list[int]]:
        return _trace_json(folder)["sequences"]

    def read(self, name: str, *, upcast: bool = True) -> Tensor:
        """A tap of all sequences, (N, ...)."""
        path = self.folder / f"{tap_part(name)}.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                tap = torch.cat([file.get_tensor(f"{s}/{name}") for s in range(self.count)])
        except (SafetensorError, OSError) as error:
            raise Unusable(f"{path}: tap {name} cannot be read ({error}); record taps for --ops") from None
        return tap.double() if upcast else tap

    def layer_inputs(self, layer: int) -> Callable[[str], Tensor]:
        """Reads what the operations of a layer take: its taps, `in` (the residual stream before it) and `mid`."""
        before = "embed" if layer == 0 else f"layers.{layer - 1}.out"

        def given(name: str) -> Tensor:
            if name == "in":
                return self.read(before)
            if name == "mid":  # added in the run dtype, as the implementation did
                attn_out = self.read(f"layers.{layer}.attn_out", upcast=False)
                return (self.read(before, upcast=False) + attn_out).double()
            return self.read(f"layers.{layer}.{name}")

        return given

    def last_out(self) -> Tensor:
        return self.read(f"layers.{self.n_layers - 1}.out")


def _trace_json(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "trace.json")
    if record.get("schema") != TRACE_SCHEMA:
        raise Unusable(f'{folder / "trace.json"}: is not a trace; its "schema" should be "{TRACE_SCHEMA}"')
    return record
