"""Write .pth and .safetensors files tensor by tensor, so that a file of any size needs the memory of one block of rows.

python - <<'END'
import torch; from nanollama.checkpoint.streams import write_pth; from nanollama.checkpoint.weights import lazy
write_pth(open("x.pth", "wb"), {"a": lazy(torch.ones(4, 2, dtype=torch.bfloat16))})
print(torch.load("x.pth", mmap=True, weights_only=True)["a"].shape)       # torch.Size([4, 2])
END
"""

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import torch

from nanollama.checkpoint.weights import STORED_DTYPES, Lazy, row_blocks

ALIGNMENT = 64  # bytes; where torch puts each record, so that a memory-mapped tensor is aligned
STORAGES = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage}
SAFETENSORS = {dtype: name for name, dtype in STORED_DTYPES.items()}
SAFETENSORS |= {torch.int8: "I8", torch.uint8: "U8"}  # an optimizer's moments in bytes


def write_pth(file: BinaryIO, entries: Mapping[str, Lazy], aliases: Mapping[str, str] | None = None) -> None:
    """What `torch.save(dict)` writes: a zip of the pickled dict and one uncompressed record per tensor.

    aliases: names that share the bytes of another name (the two ends of a tied model).
    """
    tensors = {name: _PickledTensor(str(i), entry) for i, (name, entry) in enumerate(entries.items())}
    tensors |= {alias: tensors[name] for alias, name in (aliases or {}).items()}
    with zipfile.ZipFile(file, "w") as archive:
        _record(archive, "archive/data.pkl", [_pickle(tensors)])
        _record(archive, "archive/byteorder", [b"little"])
        for i, entry in enumerate(entries.values()):
            _record(archive, f"archive/data/{i}", _as_bytes(entry))
        _record(archive, "archive/version", [b"3\n"])


class _StorageId(tuple):
    """What torch's unpickler calls a storage by: one that is yet to be written."""


class _PickledTensor:
    """Stands for a tensor while the dict is pickled: torch's own rebuild function on a storage."""

    def __init__(self, key: str, entry: Lazy) -> None:
        self.shape, numel = entry.shape, math.prod(entry.shape)
        self.storage = _StorageId(("storage", STORAGES[entry.dtype], key, "cpu", numel))

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (self.storage, 0, self.shape, strides, False, OrderedDict())


def _pickle(tensors: Mapping[str, _PickledTensor]) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return tuple(obj) if isinstance(obj, _StorageId) else None

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


def write_safetensors(file: BinaryIO, entries: Mapping[str, Lazy]) -> None:
    """The safetensors format: u64 header length, JSON header, the tensors back to back in the order of `entries`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.nbytes
        header[name] = {"dtype": SAFETENSORS[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for entry in entries.values():
        for chunk in _as_bytes(entry):
            file.write(chunk)


def _as_bytes(entry: Lazy) -> Iterator[Any]:
    """Blocks of rows as raw little-endian bytes of the promised dtype."""
    written = 0
    for block in row_blocks(entry):
        flat = block.detach().to("cpu", entry.dtype).contiguous().reshape(-1)
        written += flat.nbytes
        yield flat.view(torch.uint8).numpy().data
    assert written == entry.nbytes, f"{written} bytes of a tensor of shape {entry.shape}"
