"""Hostile .pth files: pickles that call, allocate or nest; archives of which two readers see two things."""

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from hostile import Hostile, Make, link, pipe

SHARD = "consolidated.00.pth"


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, found: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in found:
            archive.writestr(name, data)


def pickled(opcodes: bytes) -> Make:
    """The shard's pickle is these opcodes, its records stay."""

    def edit(folder: Path) -> None:
        found = records(folder / SHARD)
        rewrite(folder / SHARD, [(n, opcodes if n.endswith("data.pkl") else d) for n, d in found.items()])

    return edit


def pickle_replaced(old: bytes, new: bytes) -> Make:
    def edit(folder: Path) -> None:
        found = records(folder / SHARD)
        name = next(n for n in found if n.endswith("data.pkl"))
        assert old in found[name]
        rewrite(folder / SHARD, [(n, d.replace(old, new, 1) if n == name else d) for n, d in found.items()])

    return edit


def record_changed(change: Callable[[bytes], bytes]) -> Make:
    """The last tensor's record."""

    def edit(folder: Path) -> None:
        found = records(folder / SHARD)
        name = max(n for n in found if "/data/" in n)
        rewrite(folder / SHARD, [(n, change(d) if n == name else d) for n, d in found.items()])

    return edit


def compressed(folder: Path) -> None:
    rewrite(folder / SHARD, list(records(folder / SHARD).items()), zipfile.ZIP_DEFLATED)


def bomb(folder: Path) -> None:
    """100 MB of zeros in 100 kB."""
    found = records(folder / SHARD)
    name = max(n for n in found if "/data/" in n)
    rewrite(folder / SHARD, [(n, bytes(10**8) if n == name else d) for n, d in found.items()], zipfile.ZIP_DEFLATED)


def second_pickle(folder: Path) -> None:
    """wq and wk swapped in the one that another reader takes."""
    found = records(folder / SHARD)
    name = next(n for n in found if n.endswith("data.pkl"))
    swapped = found[name].replace(b".wq.", b".w_.").replace(b".wk.", b".wq.").replace(b".w_.", b".wk.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that is there twice
        rewrite(folder / SHARD, [*found.items(), (name, swapped)])


def pickle_elsewhere(folder: Path) -> None:
    found = records(folder / SHARD)
    name = next(n for n in found if n.endswith("data.pkl"))
    rewrite(folder / SHARD, [*found.items(), (name.replace("data.pkl", "extra/data.pkl"), found[name])])


def edit_bytes(change: Callable[[bytearray], object]) -> Make:
    def edit(folder: Path) -> None:
        data = bytearray((folder / SHARD).read_bytes())
        change(data)
        (folder / SHARD).write_bytes(data)

    return edit


def overlapping(data: bytearray) -> None:
    """The second record's place in the directory is the first's."""
    at = data.rindex(b"PK\5\6")
    (start,) = struct.unpack_from("<I", data, at + 16)
    first = data.index(b"PK\1\2", start)
    second = data.index(b"PK\1\2", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]


def flagged(data: bytearray, header: bytes, at: int) -> None:
    """Of the first header of this kind, the bit that says that its record is encrypted."""
    data[data.index(header) + at] |= 1


def renamed_in_local_header(data: bytearray) -> None:
    at = data.index(b"data.pkl")
    data[at : at + 8] = b"data.pkx"


def appended_archive(folder: Path) -> None:
    """A second archive behind the first: readers differ on which one counts."""
    made = io.BytesIO()
    torch.save({"norm.weight": torch.ones(16)}, made)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + made.getvalue())


def long_storage(count: bytes) -> Make:
    """A storage that says it has more numbers than its record: LONG1 of eight bytes."""

    def edit(folder: Path) -> None:
        torch.save({"norm.weight": torch.ones(16)}, folder / SHARD)
        found = records(folder / SHARD)
        name = next(n for n in found if n.endswith("data.pkl"))
        old = b"q\x06K\x10t" if b"q\x06K\x10t" in found[name] else b"K\x10t"
        assert old in found[name]
        new = found[name].replace(old, old[:-3] + b"\x8a" + bytes([len(count)]) + count + b"t", 1)
        rewrite(folder / SHARD, [(n, new if n == name else d) for n, d in found.items()])

    return edit


def nested_tuples(depth: int, twice: bool) -> bytes:
    """(((...),),), or each level named twice, so that a hash or a repr doubles at each."""
    body = b")q\x00"
    for _ in range(depth):
        body += b"h\x00\x86q\x00" if twice else b"\x85"
    return body


def as_key(item: bytes) -> bytes:
    return b"\x80\x02}" + item + b"K\x01s."


def of_pickle(opcodes: bytes, part: str) -> Hostile:
    return Hostile("meta", pickled(opcodes), part)


def of_shard(make: Make, part: str) -> Hostile:
    return Hostile("meta", make, part)


PTH: dict[str, Hostile] = {
    "a pickle that calls eval": of_pickle(
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "asks for builtins.eval"
    ),
    "a pickle that calls os.system": of_pickle(
        b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.", "asks for posix.system"
    ),
    "a pickle of numpy": of_pickle(b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00a\x85R.", "asks for numpy.load"),
    "a pickle of torch.load": of_pickle(b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R.", "asks for torch.load"),
    "a global named by stack": of_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "protocol 4"),
    "STACK_GLOBAL in protocol 2": of_pickle(
        b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "opcode STACK_GLOBAL"
    ),
    "an instance by INST": of_pickle(b"\x80\x02(S'ls'\nios\nsystem\n.", "opcode STRING"),
    "an object by OBJ": of_pickle(b"\x80\x02(cos\nsystem\no.", "asks for os.system"),
    "an object by NEWOBJ": of_pickle(b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "an extension code": of_pickle(b"\x80\x02\x82\x01.", "opcode EXT1"),
    "a bytearray of 3 GB": of_pickle(b"\x80\x02\x96" + struct.pack("<Q", 3 << 30) + b".", "damaged pickle"),
    "a text of 4 GB": of_pickle(b"\x80\x02X\xff\xff\xff\xff.", "damaged pickle"),
    "a number of 255 bytes": of_pickle(b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "more than 64 bits"),
    "a number of 4300 digits": of_pickle(b"\x80\x02I" + b"9" * 5000 + b"\n.", "damaged pickle|opcode INT"),
    "tuples 10^5 deep": of_pickle(b"\x80\x02" + nested_tuples(100_000, False) + b".", "nested more than"),
    "tuples named twice, 60 deep": of_pickle(b"\x80\x02" + nested_tuples(60, True) + b".", "nested more than|values"),
    "a key of nested tuples": of_pickle(as_key(nested_tuples(20, True)), "a tuple as a key"),
    "a key of a number that is no whole one": of_pickle(as_key(b"G" + b"\0" * 8), "a number as a key"),
    "lists 10^5 deep": of_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested more than"),
    "dicts 1000 deep": of_pickle(b"\x80\x02" + b"}K\x01" * 1000 + b"N" + b"s" * 1000 + b".", "nested more than"),
    "a list that holds itself": of_pickle(b"\x80\x02]q\x00h\x00a.", "may hold itself"),
    "a memo that was never filled": of_pickle(b"\x80\x02h\x07.", "memo lacks"),
    "a memo of 2^32": of_pickle(b"\x80\x02Nr\xff\xff\xff\xff.", "plain dict of tensors|NoneType|state dict"),
    "an empty stack": of_pickle(b"\x80\x02\x85.", "stack or memo lacks"),
    "two values at the end": of_pickle(b"\x80\x02NN.", "2 values"),
    "a pickle without an end": of_pickle(b"\x80\x02}", "damaged pickle"),
    "an empty pickle": of_pickle(b"", "damaged pickle"),
    "the same weight twice": of_pickle(b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "twice"),
    "attributes that hide methods": of_pickle(
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.", "attributes set"
    ),
    "a storage in no record": of_shard(
        pickle_replaced(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00z"), "which is not there"
    ),
    "a storage of 2^40 numbers": of_shard(long_storage(struct.pack("<Q", 1 << 40)[:6]), "in a record of"),
    "a storage of 2^70 numbers": of_shard(long_storage((1 << 70).to_bytes(10, "little")), "more than 64 bits"),
    "a storage of -1 numbers": of_shard(long_storage(b"\xff"), "in a record of"),
    "a storage of another type": of_shard(
        pickle_replaced(b"BFloat16Storage", b"ComplexFloatStorage"), "asks for torch.ComplexF"
    ),
    "a record 64 bytes short": of_shard(
        record_changed(lambda d: d[:-64] if len(d) > 64 else d[:-16]), "in a record of"
    ),
    "a record too long": of_shard(record_changed(lambda d: d + bytes(64)), "in a record of"),
    "a deflated archive": of_shard(compressed, "compressed"),
    "a deflate bomb": of_shard(bomb, "compressed"),
    "two data.pkl": of_shard(second_pickle, "there twice"),
    "a data.pkl in a folder": of_shard(pickle_elsewhere, "second data.pkl"),
    "records that overlap": of_shard(edit_bytes(overlapping), "on another's bytes"),
    "a record with two names": of_shard(edit_bytes(renamed_in_local_header), "another in its own header"),
    "a record that claims to be encrypted": of_shard(edit_bytes(lambda d: flagged(d, b"PK\1\2", 8)), "is encrypted"),
    "a record encrypted by its own header": of_shard(edit_bytes(lambda d: flagged(d, b"PK\3\4", 6)), "is encrypted"),
    "two archives in one file": of_shard(appended_archive, "before or behind"),
    "bytes before the archive": of_shard(
        edit_bytes(lambda d: d.__setitem__(slice(0, 0), b"#!/bin/sh\n")), "before or behind"
    ),
    "a pickle with a wrong checksum": of_shard(
        edit_bytes(lambda d: d.__setitem__(d.index(b"layers.0"), 76)), "CRC|truncated"
    ),
    "a pickle from before zip": of_shard(
        lambda f: torch.save({}, f / SHARD, _use_new_zipfile_serialization=False), "not a .pth file"
    ),
    "a shard that is a pipe": of_shard(lambda f: pipe(f / SHARD), "is a pipe|0 files"),
    "a shard that is an endless device": of_shard(lambda f: link(f / SHARD, "/dev/zero"), "is a device|0 files"),
    "a shard cut in the middle": of_shard(edit_bytes(lambda d: d.__delitem__(slice(len(d) // 2, None))), "truncated"),
}
