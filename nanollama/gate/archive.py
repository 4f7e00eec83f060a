"""torch's zip of a pickle and one record per tensor, walked whole before torch sees it: see `check`.

python -c "from nanollama.gate.archive import check; from pathlib import Path; check(Path('consolidated.00.pth'))"

Source: torch.serialization and caffe2/serialize/inline_container.cc for what torch writes and reads.
"""

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nanollama import gate
from nanollama.gate import CheckpointError, pickles

MAX_RECORDS = 100_000  # Llama 3.1 405B has 1,138 weights
MAX_PICKLE_BYTES = 1 << 24  # of those, 0.4 MB of pickle
MAX_NOTE_BYTES = 4096  # version, byteorder and the like
ENCRYPTED = 0x2041  # flag bits: encrypted, by strong encryption, with its header masked
LOCAL = struct.Struct("<4s5H3L2H")  # a record's own header; the directory at the end repeats it


class Record(NamedTuple):
    """Where a record's bytes lie in the file."""

    start: int
    size: int


def check(path: Path) -> None:
    """Raises CheckpointError unless the file is an archive of plain tensors whose every claim holds.

    Nothing is compressed, no two records share bytes or a name, and the pickle asks for tensors that its records hold.
    """
    gate.require_file(path)
    try:
        with path.open("rb") as file:
            check_stream(path, file)
    except FileNotFoundError:
        raise gate.missing(path, "is missing: download it again") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror}): look at its disk and permissions") from None


def check_stream(path: Path, file: BinaryIO) -> None:
    """`check` of an archive that lies in `path`, or in a part of it."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if not _is_alone(file, records, archive.start_dir):
                raise CheckpointError(path, "is refused: bytes before or behind the archive, where another may hide")
            found = _laid_out(path, file, records, archive.start_dir)
            _check_records(path, archive, found)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        gate.refuse_strangers(path)
        raise CheckpointError(
            path, f"is truncated or not a .pth file of torch >= 1.6 ({gate.reason(error)}); download it again"
        ) from None


def _is_alone(file: BinaryIO, records: list[zipfile.ZipInfo], start_dir: int) -> bool:
    """Readers look for the directory from different ends: one archive fills the file, without a comment."""
    file.seek(-22, 2)
    end = file.read()
    return end[:4] == b"PK\5\6" and end[-2:] == b"\0\0" and min((r.header_offset for r in records), default=0) == 0


def _laid_out(path: Path, file: BinaryIO, records: list[zipfile.ZipInfo], start_dir: int) -> dict[str, Record]:
    """Where each record lies, by its name without the archive's folder; raises CheckpointError."""
    if len(records) > MAX_RECORDS:
        raise CheckpointError(path, f"is refused: {len(records):,} records, {MAX_RECORDS:,} are allowed")
    found: dict[str, Record] = {}
    folder, end = None, 0
    for record in sorted(records, key=lambda r: r.header_offset):
        shown = gate.shown(record.filename)
        top, _, name = record.filename.partition("/")
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise CheckpointError(path, f"record {shown} is compressed: torch never writes that; refused")
        if name in found or (folder or top) != top or not name:
            raise CheckpointError(path, f"is refused: record {shown} is there twice, or in another folder")
        if record.header_offset < end:
            raise CheckpointError(path, f"is refused: record {shown} lies on another's bytes")
        file.seek(record.header_offset)
        header = LOCAL.unpack(file.read(LOCAL.size))
        said = file.read(header[9])
        start = record.header_offset + LOCAL.size + header[9] + header[10]
        same = header[0] == b"PK\3\4" and header[3] == 0 and said == record.orig_filename.encode("utf-8")
        # Sizes may stand behind the data instead (bit 3), or in a field for large files.
        if not same or not (header[2] & 8 or header[8] in (record.file_size, 0xFFFFFFFF)):
            raise CheckpointError(
                path, f"is refused: record {shown} is another in its own header than in the directory"
            )
        if (record.flag_bits | header[2]) & ENCRYPTED:
            raise CheckpointError(path, f"record {shown} is encrypted: torch never writes that; refused")
        folder, end = top, start + record.file_size
        if end > start_dir:
            raise CheckpointError(path, f"is truncated: record {shown} ends beyond it; download it again")
        found[name] = Record(start, record.file_size)
    return found


def _check_records(path: Path, archive: zipfile.ZipFile, found: dict[str, Record]) -> None:
    folder = archive.namelist()[0].partition("/")[0] if found else ""
    if "data.pkl" not in found:
        raise CheckpointError(path, "holds no data.pkl: it is no checkpoint of torch's; give another file")
    if any(name.rpartition("/")[2] == "data.pkl" and name != "data.pkl" for name in found):
        raise CheckpointError(path, "is refused: a second data.pkl, of which readers may take either")
    size = found["data.pkl"].size
    if size > MAX_PICKLE_BYTES:
        raise CheckpointError(path, f"is refused: a pickle of {size:,} bytes, {MAX_PICKLE_BYTES:,} are allowed")
    notes = {name: archive.read(f"{folder}/{name}") for name in ("byteorder", "version") if _is_note(path, name, found)}
    if notes.get("byteorder", b"little").strip() != b"little":
        raise CheckpointError(path, "holds big-endian numbers: save it again on a usual machine")
    sizes = {name.removeprefix("data/"): r.size for name, r in found.items() if name.startswith("data/")}
    try:
        pickles.check(archive.read(f"{folder}/data.pkl"), sizes)  # which compares its checksum, too
    except pickles.Refused as finding:
        raise CheckpointError(path, f"is not a plain state dict and is not loaded ({finding})") from None


def _is_note(path: Path, name: str, found: dict[str, Record]) -> bool:
    if name in found and found[name].size > MAX_NOTE_BYTES:
        raise CheckpointError(path, f"is refused: its record {name} has {found[name].size:,} bytes")
    return name in found
