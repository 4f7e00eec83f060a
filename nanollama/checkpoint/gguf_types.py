"""ggml's number formats: their names and blocks, read as fp32 and written, through the `gguf` package (extra `gguf`).

A quantized row is blocks of 32 to 256 weights that share scales. F32, F16 and BF16 need no package.

    python -c "from nanollama.checkpoint.gguf_types import writable; print(writable())"    # ['q4_0', 'q4_1', ...]

Source: ggml's `ggml_type` and, in the package, `gguf.quants`, whose numbers these are bit for bit.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanollama.checkpoint.weights import STORED_DTYPES, CheckpointError, Lazy
from nanollama.gguf_header import Header, damaged

STEP_BYTES = 1 << 22  # of fp32 that the package makes at a time: its temporaries are several times as large
# Once in ggml, read by no program of today.
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}


class GgmlType(NamedTuple):
    """A block is `block` weights in `nbytes` bytes. dtype: what torch reads it as; None needs the package."""

    name: str
    block: int
    nbytes: int
    dtype: torch.dtype | None = None

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose rows are whole blocks."""
        return math.prod(shape) // self.block * self.nbytes


F32, BF16, F16 = (GgmlType(name, 1, dtype.itemsize, dtype) for name, dtype in STORED_DTYPES.items())
Q8_0 = GgmlType("Q8_0", 32, 34)
DTYPES = {"fp32": F32, "fp16": F16, "bf16": BF16}  # our names of those that need no package
PLAIN = {0: F32, 1: F16, 30: BF16}  # by ggml's number


def package(path: Path, what: str) -> Any:
    """The gguf package; `what` needs it."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(path, f"{what} needs the gguf package: pip install 'llama-parity[gguf]'") from None
    return gguf


def type_of(path: Path, tensor: str, number: int) -> GgmlType:
    """The type of a tensor by ggml's number. Raises CheckpointError, with the type's name, for one that is not read."""
    if number in PLAIN:
        return PLAIN[number]
    if number in REMOVED:
        what = f"tensor {tensor} is {REMOVED[number]}, which llama.cpp has removed: get this model as Q4_0"
        raise CheckpointError(path, what)
    gguf = package(path, f"tensor {tensor} is quantized (ggml's type {number}), which")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        what = f"tensor {tensor} is of ggml's type {number}, unknown to the gguf package: pip install -U gguf"
        raise CheckpointError(path, what) from None
    if not _is_done(kind, "dequantize"):
        what = f"tensor {tensor} is {kind.name}, which the gguf package cannot dequantize: get another type"
        raise CheckpointError(path, what)
    return _sized(kind)


def _sized(kind: Any) -> GgmlType:
    from gguf import GGML_QUANT_SIZES

    return GgmlType(kind.name, *GGML_QUANT_SIZES[kind])


@cache
def _is_done(kind: Any, what: str) -> bool:
    """Whether the installed package can `quantize` or `dequantize` a type: it says so only when asked to."""
    import gguf

    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    zeros = np.zeros((1, nbytes), np.uint8) if what == "dequantize" else np.zeros((1, block), np.float32)
    try:
        getattr(gguf, what)(zeros, kind)
    except NotImplementedError:
        return False
    return True


def placed(path: Path, header: Header) -> dict[str, tuple[GgmlType, slice]]:
    """Each tensor's type and bytes: inside of the file, in whole blocks, not on another's. Raises CheckpointError."""
    found, end = {}, 0
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].offset):
        kind = type_of(path, name, tensor.type)
        if tensor.shape[-1] % kind.block:
            what = f"tensor {name} is {kind.name}, in blocks of {kind.block} weights, which its rows of"
            raise CheckpointError(path, f"{what} {tensor.shape[-1]} are no multiple of: get another file of this model")
        if tensor.offset < end:
            raise damaged(path, f"tensor {name} lies on the bytes of another")
        end = tensor.offset + kind.size(tensor.shape)
        if end > path.stat().st_size:
            raise damaged(path, f"tensor {name} ends beyond the file: it is truncated")
        found[name] = kind, slice(tensor.offset, end)
    return found


def read_tensor(stored: Tensor, kind: GgmlType, shape: tuple[int, ...]) -> Lazy:
    """The bytes of a tensor as rows that are converted when they are asked for, a few MB at a time."""
    if kind.dtype is not None:
        if stored.data_ptr() % kind.dtype.itemsize:
            stored = stored.clone()  # an alignment of 1 is legal, torch's views need their own
        whole = stored.view(kind.dtype).view(shape)
        return Lazy(shape, kind.dtype, lambda start, stop: whole[start:stop])
    if len(shape) == 1:  # one row of blocks, which are not cut
        row = read_tensor(stored, kind, (1, *shape))
        return Lazy(shape, torch.float32, lambda start, stop: row.read(0, 1)[0, start:stop])
    return Lazy(shape, torch.float32, lambda start, stop: _dequantize(stored, kind, shape, start, stop))


def _dequantize(stored: Tensor, kind: GgmlType, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    import gguf

    number, columns = gguf.GGMLQuantizationType[kind.name], math.prod(shape[1:])
    rows = stored.view(-1, kind.size((1, columns))).numpy()  # one row of bytes for each of the tensor's first axis
    out = np.empty((stop - start, columns), np.float32)
    step = max(1, STEP_BYTES // (4 * columns))
    with np.errstate(all="ignore"):  # a damaged scale may be NaN, which is for whoever reads the weights
        for i in range(0, stop - start, step):
            block = rows[start + i : min(start + i + step, stop)]
            out[i : i + step] = gguf.dequantize(block, number)
    return torch.from_numpy(out).view(-1, *shape[1:])


# --- Writing ---------------------------------------------------------------------------------------------------------


def writable() -> list[str]:
    """Types that the installed package quantizes to, as `convert --dtype` names them."""
    from gguf import GGML_QUANT_SIZES as sizes

    return [kind.name.lower() for kind, (block, _) in sizes.items() if block > 1 and _is_done(kind, "quantize")]


def named(path: Path, dtype: str | None) -> GgmlType | None:
    """The type that `--dtype` names; raises CheckpointError with the list of those that can be written."""
    if dtype is None or dtype in DTYPES:
        return DTYPES.get(dtype or "")
    gguf = package(path, "writing it")
    if dtype not in (known := writable()):
        raise CheckpointError(path, f"GGUF has no dtype {dtype!r}: choose one of {', '.join([*DTYPES, *known])}")
    return _sized(gguf.GGMLQuantizationType[dtype.upper()])


def encode(rows: Tensor, kind: GgmlType) -> Any:
    """Whole rows as the bytes of the type; they already have its dtype where it has one, else fp32."""
    if kind.dtype is not None:
        return rows.contiguous().flatten().view(torch.uint8).numpy().data
    import gguf

    with np.errstate(all="ignore"):  # a block of zeros has no inverse scale; the package knows
        return gguf.quantize(rows.contiguous().numpy(), gguf.GGMLQuantizationType[kind.name]).data


def file_type(kind: GgmlType) -> int:
    """general.file_type: llama.cpp's number for "mostly this type"."""
    from gguf import LlamaFileType

    names = (f"ALL_{kind.name}", f"MOSTLY_{kind.name}", f"MOSTLY_{kind.name}_MOE")
    return next((int(known) for known in LlamaFileType if known.name in names), int(LlamaFileType.GUESSED))
