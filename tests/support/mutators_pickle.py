"""Structure-aware changes of torch's files: the opcodes of their pickle, the records of their zip; see mutators.py.

mutate_zip(Path("consolidated.00.pth").read_bytes(), random.Random(7))
"""

import pickletools
import warnings
import zipfile
from io import BytesIO

from mutators import BYTES, INTS, Rng, pack

NAMES = (b"os", b"system", b"pathlib", b"Path.write_text", b"FileSystem.rm_file", b"../x", b"builtins", b"eval")


def operations(pickled: bytes) -> list[bytes]:
    at = [position for _, _, position in pickletools.genops(pickled)]
    return [pickled[a:b] for a, b in zip(at, [*at[1:], len(pickled)], strict=True)]


def other_operation(code: bytes, rng: Rng) -> bytes:
    name, argument = code[:1], code[1:]
    if name in (b"J", b"K", b"M", b"\x8a", b"h", b"q", b"j", b"r"):
        value = rng.choice((*INTS, 2**70))
        forms = {b"J": "<i", b"K": "<B", b"M": "<H", b"h": "<B", b"q": "<B", b"j": "<I", b"r": "<I"}
        if name in (b"J", b"K", b"M") and rng.random() < 0.5:
            long = value.to_bytes(10, "little", signed=True)
            return b"\x8a" + bytes([len(long)]) + long
        return name + pack(forms[name], value) if name in forms else b"\x8a\x01\x07"
    if name == b"X":
        text = rng.choice((argument[4:] + b"x", argument[4:-1], *BYTES))
        return b"X" + pack("<I", len(text)) + text
    if name == b"\x8c":
        text = rng.choice((argument[1:] + b"x", argument[1:-1], *NAMES))[:255]
        return b"\x8c" + bytes([len(text)]) + text
    if name == b"c":
        return b"c" + rng.choice(
            (b"os\nsystem\n", b"builtins\neval\n", b"collections\nOrderedDict\n", b"torch\nload\n")
        )
    if name in (b"\x88", b"\x89", b"N", b"}", b"]", b")"):
        return rng.choice((b"\x88", b"N", b"}", b"]", b")", b"K\x01", b"(lp0\n"))
    return rng.choice((code * 2, b"", b"0", b"2", b"(", b"N", b"R", b"\x96" + pack("<Q", rng.choice(INTS)), b"\x94"))


def mutate_pickle(pickled: bytes, rng: Rng) -> bytes:
    codes = operations(pickled)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, action = rng.randrange(len(codes)), rng.randrange(8)
        if action == 0:
            del codes[at]
        elif action == 1:
            codes[at:at] = codes[at : at + rng.choice((1, 2, 8))]
        elif action == 2:
            other = rng.randrange(len(codes))
            codes[at], codes[other] = codes[other], codes[at]
        elif action == 3:
            codes[at:at] = rng.choice(([b"("] * 2000, [b"K\x01", b"\x85"] * 500, [b"]"] * 300, [b"h\x00"] * 300))
        else:
            codes[at] = other_operation(codes[at], rng)
    return b"".join(codes)


def mutate_zip(data: bytes, rng: Rng) -> bytes:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        records = [[info.filename, archive.read(info), zipfile.ZIP_STORED] for info in archive.infolist()]
    for _ in range(rng.choice((1, 1, 1, 2))):
        record, action = rng.choice(records), rng.randrange(12)
        if action <= 6:
            record = next(r for r in records if r[0].endswith("data.pkl"))
            try:
                record[1] = mutate_pickle(record[1], rng)
            except ValueError:  # it is none any more
                continue
        elif action == 7:
            record[1] = rng.choice((record[1][:-1], record[1] + b"\0" * 64, b"", record[1] * 2))
        elif action == 8:
            record[2] = zipfile.ZIP_DEFLATED
        elif action == 9:
            record[0] = rng.choice((record[0] + "x", "../" + record[0], rng.choice(records)[0], "x/data.pkl"))
        elif action == 10:
            records.append([record[0] if rng.random() < 0.5 else "y/data.pkl", record[1], zipfile.ZIP_STORED])
        elif len(records) > 1:
            records.remove(record)
        if not any(r[0].endswith("data.pkl") for r in records):
            break
    out = BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content, method in records:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return flip(out.getvalue(), rng, 64) if rng.random() < 0.1 else out.getvalue()


def flip(data: bytes, rng: Rng, ends: int) -> bytes:
    """A byte of the first or last `ends`."""
    out = bytearray(data)
    at = rng.choice((rng.randrange(ends), len(out) - 1 - rng.randrange(ends)))
    out[at] ^= 1 << rng.randrange(8)
    return bytes(out)
