"""Write .pth and .safetensors files tensor by tensor, so that a file of any size needs the memory of one block of rows.

Needs torch and the standard library only. The caller says first what is coming (name -> dtype and shape), then hands
over each tensor as one or more blocks of rows.

    python - <<'END'
    import torch; from nanollama.checkpoint.streams import write_pth
    write_pth(open("x.pth", "wb"), {"a": (torch.bfloat16, (4, 2))}, lambda name: [torch.ones(4, 2)])
    print(torch.load("x.pth", mmap=True, weights_only=True)["a"].shape)       # torch.Size([4, 2])
    END
"""

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Blocks = Callable[[str], Iterable[Tensor]]

ALIGNMENT = 64  # bytes; where torch puts each record, so that a memory-mapped tensor is aligned
STORAGES = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage}
SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SAFETENSORS |= {torch.int8: "I8", torch.uint8: "U8"}  # an optimizer's moments in bytes


def write_pth(file: BinaryIO, specs: Specs, blocks: Blocks, aliases: Mapping[str, str] | None = None) -> None:
    """What `torch.save(dict)` writes: a zip of the pickled dict and one uncompressed record per tensor.

    aliases: names that share the bytes of another name (the two ends of a tied model).
    """
    keys = {name: str(i) for i, name in enumerate(specs)}
    tensors = {name: _PickledTensor(keys[name], *spec) for name, spec in specs.items()}
    tensors |= {alias: tensors[name] for alias, name in (aliases or {}).items()}
    with zipfile.ZipFile(file, "w") as archive:
        _record(archive, "archive/data.pkl", [_pickle(tensors)])
        _record(archive, "archive/byteorder", [b"little"])
        for name, spec in specs.items():
            _record(archive, f"archive/data/{keys[name]}", _as_bytes(name, spec, blocks(name)))
        _record(archive, "archive/version", [b"3\n"])


class _PickledTensor:
    """Stands for a tensor while the dict is pickled: torch's own rebuild function on a storage yet to be written."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.storage = _PickledStorage(key, dtype, math.prod(shape))
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _PickledStorage:
    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.persistent_id = ("storage", STORAGES[dtype], key, "cpu", numel)


def _pickle(tensors: Mapping[str, _PickledTensor]) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.persistent_id if isinstance(obj, _PickledStorage) else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(dict(tensors))
    return out.getvalue()


def _record(archive: zipfile.ZipFile, name: str, chunks: Iterable[Any]) -> None:
    """One stored record whose data begins at a multiple of ALIGNMENT (padding in the header's extra field)."""
    info = zipfile.ZipInfo(name)  # dated 1980: the same weights give the same bytes
    position = archive.fp.tell()  # type: ignore[union-attr]
    header = 30 + len(name) + 20 + 4  # fixed part, name, zip64 sizes, our extra field's own header
    padding = -(position + header) % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        for chunk in chunks:
            record.write(chunk)


def write_safetensors(file: BinaryIO, specs: Specs, blocks: Blocks, metadata: Mapping[str, str] | None = None) -> None:
    """The safetensors format: u64 header length, JSON header, the tensors back to back in the order of `specs`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, spec in specs.items():
        for chunk in _as_bytes(name, spec, blocks(name)):
            file.write(chunk)


def _as_bytes(name: str, spec: tuple[torch.dtype, tuple[int, ...]], blocks: Iterable[Tensor]) -> Iterable[Any]:
    """Blocks of rows as raw little-endian bytes of the promised dtype; checks that they make the promised shape."""
    dtype, shape = spec
    rows = 0
    for block in blocks:
        if tuple(block.shape[1:]) != tuple(shape[1:]):
            raise ValueError(f"{name}: a block of rows has shape {tuple(block.shape)}, the tensor {shape}")
        rows += block.shape[0]
        flat = block.detach().to("cpu", dtype).contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
    if rows != shape[0]:
        raise ValueError(f"{name}: blocks of {rows} rows in all, the tensor has {shape[0]}")
