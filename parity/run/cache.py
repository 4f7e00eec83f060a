"""Traces of the references and the oracle, kept between runs: a second try of a candidate waits for it alone.

An entry's name is a hash of all that a trace depends on: the case, the bytes of every file that the implementation may
read, our reference code, the packages, the Python and the processor. So another file, version or machine finds nothing.
An entry is a folder that appears whole, by a rename, with a list of its files; one that is not as it was written is
thrown away. The oldest go when there are too many bytes.

    $NANOLLAMA_CACHE/traces/KEY/entry.json       {"key": KEY, "files": {"fp32/head.safetensors": [bytes, crc32]}}
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parity.contract import UsageError
from parity.machine import installed, user_folder

LIMIT_BYTES = 8 * 10**9
SHARE_OF_FREE = 0.25  # of the disk's free bytes that traces may take, if that is less
FILES_BYTES = 8 * 10**9  # of files that are hashed for one case
SETTLED_S = 2.0  # a file changed within so many seconds may change again without another time stamp
LEFT_BEHIND_S = 3600.0  # after which an unfinished entry belongs to no run
BLOCK = 1 << 22
ENTRY = "entry.json"
PACKAGES: tuple[str, ...] = (
    "torch",
    "numpy",
    "transformers",
    "llama_models",
    "fairscale",
    "tokenizers",
    "tiktoken",
    "sentencepiece",
)
PACKAGES += ("safetensors", "gguf", "accelerate", "jinja2")
BESIDE = (".json", ".jinja", ".model", ".txt")  # what is read beside a tokenizer's file
SETTINGS = ("MKL_", "ONEDNN_", "DNNL_", "ATEN_", "KMP_")  # of the kernels, in the environment
CODE = Path(__file__).resolve().parents[2] / "reference"


@dataclass
class TraceCache:
    """`limit_bytes`: of all entries together. `code`: the folder of our reference implementations.

    `named`: by the user (`--keep`), so that a long run goes on where it was interrupted: everything is kept, of any
    checkpoint and device. Of files that are too many to be hashed, size and time of change stand for the bytes.
    """

    folder: Path
    limit_bytes: int = LIMIT_BYTES
    code: Path = CODE
    named: bool = False
    hashes: dict[str, str] = field(default_factory=dict)  # of files, by path and time stamps
    news: bool = False  # among them, since they were written

    def key(self, module: str, arguments: list[str], case: dict[str, Any], run: Path) -> str | None:
        """What names the trace; None where it is not kept: on an accelerator, or where there is too much to hash.

        arguments: those beside the case and the folder to write to; the paths among them stand for what lies there.
        run: the temporary folder of the run, whose name tells nothing.
        """
        if case["device"] != "cpu" and not self.named:
            return None
        files = [Path(case["checkpoint"]), *(Path(a) for a in arguments if a.startswith(str(run)))]
        found = [path for folder in files for path in _within(folder)]
        if case.get("tokenizer"):
            found += _beside(Path(case["tokenizer"]))
        try:
            small = sum(path.stat().st_size for path in found) <= FILES_BYTES
            if not small and not self.named:
                return None
            content = {_plain(str(path), run): self._hash(path) if small else _stamp(path) for path in found}
        except OSError:
            return None
        what = {"module": module, "arguments": [_plain(a, run) for a in arguments], "files": content}
        what |= {"case": {k: _plain(v, run) if isinstance(v, str) else v for k, v in case.items()}}
        what |= {"code": hash_code(self.code), "machine": machine() | _accelerator(case["device"])}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def has(self, key: str | None) -> bool:
        return key is not None and (self.folder / key / ENTRY).is_file()

    def restore(self, key: str | None, out: Path) -> bool:
        """The trace in `out`, where there is one and it is whole. A damaged entry goes."""
        if key is None or not self.has(key):
            return False
        entry = self.folder / key
        try:
            for name in _checked(entry, key):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                _put(entry / name, name, out / name)
            os.utime(entry)  # it was used now
            self._write_hashes()
            return True
        except (OSError, ValueError, TypeError, KeyError):
            shutil.rmtree(out, ignore_errors=True)
            self._remove(entry)
            return False

    def keep(self, key: str | None, out: Path) -> None:
        """A finished trace, for the next run. Raises OSError where it cannot be written."""
        if key is None or self.has(key):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {str(path.relative_to(out)): path for path in _within(out)}
        size = sum(path.stat().st_size for path in files.values())
        if not self.named:
            limit = min(self.limit_bytes, int(SHARE_OF_FREE * shutil.disk_usage(self.folder).free))
            if size > limit:
                return
            self._trim(limit - size)
        self._write_hashes()
        made = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
        try:
            for name, path in files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                _put(path, name, made / name)
            listed = {name: [path.stat().st_size, _crc(path)] for name, path in files.items()}
            (made / ENTRY).write_text(json.dumps({"key": key, "files": listed}))
            made.rename(self.folder / key)
        finally:  # it has another name by now, or another run was faster
            shutil.rmtree(made, ignore_errors=True)

    def _trim(self, room_bytes: int) -> None:
        """Remove the entries that were not used for longest until the others fit."""
        sizes = {}
        for entry in self.folder.iterdir():
            if entry.name.startswith(".part-") and time.time() - entry.stat().st_mtime > LEFT_BEHIND_S:
                shutil.rmtree(entry, ignore_errors=True)
            elif re.fullmatch(r"[0-9a-f]{64}", entry.name):
                sizes[entry] = sum(path.stat().st_size for path in _within(entry))
        for entry in sorted(sizes, key=lambda e: e.stat().st_mtime):
            if sum(sizes.values()) <= room_bytes:
                return
            self._remove(entry)
            del sizes[entry]

    def _remove(self, entry: Path) -> None:
        """At once, so that nobody sees half of it."""
        gone = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
        with contextlib.suppress(OSError):  # another run did
            entry.rename(gone / "entry")
        shutil.rmtree(gone, ignore_errors=True)

    # --- Hashes ------------------------------------------------------------------------------------------------------

    def _hash(self, path: Path) -> str:
        """SHA-256 of a file's bytes; of a file that did not change since, as it was."""
        stat, stamp = path.stat(), _stamp(path)
        if stamp not in self.hashes:
            found = _sha256(path)
            if time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED_S:
                return found
            self.hashes[stamp], self.news = found, True
        return self.hashes[stamp]

    def read_hashes(self) -> None:
        """Those of earlier runs. What is not as it was written is not believed."""
        try:
            found = json.loads((self.folder / "hashes.json").read_text())
            self.hashes |= {str(k): v for k, v in found.items() if re.fullmatch(r"[0-9a-f]{64}", v)}
        except (OSError, ValueError, TypeError, AttributeError):
            return

    def _write_hashes(self, most: int = 4096) -> None:
        if self.news:
            made = self.folder / f".part-hashes-{os.getpid()}"
            made.write_text(json.dumps(dict(list(self.hashes.items())[-most:])))
            made.replace(self.folder / "hashes.json")
            self.news = False


def trace_cache(folder: Path) -> TraceCache | None:
    """The one in the user's cache folder: at most $NANOLLAMA_TRACE_BYTES, of which 0 keeps none. Raises UsageError."""
    said = os.environ.get("NANOLLAMA_TRACE_BYTES") or str(LIMIT_BYTES)
    if not said.isdecimal():
        raise UsageError(f"NANOLLAMA_TRACE_BYTES={said}: expected a number of bytes, 0 to keep no traces")
    if not int(said):
        return None
    cache = TraceCache(folder / "traces", int(said))
    cache.read_hashes()
    return cache


def kept_in(folder: Path) -> TraceCache:
    """The one that the user names, made where there is none. Raises UsageError."""
    cache = TraceCache(user_folder("--keep", folder), named=True)
    cache.read_hashes()
    return cache


def _accelerator(device: str) -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}


def hash_code(folder: Path) -> dict[str, str]:
    """The hash of each module of a folder."""
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*.py"))}


def machine() -> dict[str, Any]:
    """Versions, processor and settings on which bits depend."""
    settings = {key: value for key, value in sorted(os.environ.items()) if key.startswith(SETTINGS)}
    cpu = [platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor()]
    return {"versions": installed(PACKAGES), "python": platform.python_version(), "cpu": cpu, "settings": settings}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), "")


def _within(path: Path) -> list[Path]:
    """All files of a folder, or the file itself."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _beside(tokenizer: Path) -> Iterator[Path]:
    """A tokenizer's file and those that transformers may read beside it."""
    yield tokenizer
    yield from sorted(p for p in tokenizer.parent.iterdir() if p != tokenizer and p.suffix in BESIDE and p.is_file())


def _stamp(path: Path) -> str:
    """Changes with the file."""
    stat = path.stat()
    return f"{path}:{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _plain(path: str, run: Path) -> str:
    return path.replace(str(run), "RUN")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _checked(entry: Path, key: str) -> list[str]:
    """The names of an entry's files. Raises ValueError and others where it is not as it was written."""
    said = json.loads((entry / ENTRY).read_text())
    if said["key"] != key or "trace.json" not in said["files"]:
        raise ValueError("another entry's list")
    names = {str(path.relative_to(entry)) for path in _within(entry)} - {ENTRY}
    if names != set(said["files"]):
        raise ValueError("files are missing, or were added")
    for name, (size, crc) in said["files"].items():
        path = entry / name
        if path.is_symlink() or path.stat().st_size != size or _crc(path) != crc:
            raise ValueError(f"{name} was changed")
    return sorted(names)


def _link(path: Path, to: Path) -> None:
    """The same bytes under another name, in the place of what was there; a copy on another file system."""
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def _put(path: Path, name: str, to: Path) -> None:
    """A trace's file. A later round writes those beside the dtypes' folders again: they are copied."""
    if "/" in name:
        _link(path, to)
    else:
        to.unlink(missing_ok=True)
        shutil.copyfile(path, to)
