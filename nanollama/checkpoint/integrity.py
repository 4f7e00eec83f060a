"""Checksums beside a checkpoint: Meta's checklist.chk (md5) and SHA256SUMS, both in the format of md5sum and sha256sum.

sha256sum *.safetensors config.json > SHA256SUMS
python -c "from nanollama.checkpoint.integrity import verify; print(verify('DIR'))"    # ['config.json', ...]
"""

import hashlib
import re
from pathlib import Path

from nanollama import gate
from nanollama.checkpoint.weights import CheckpointError
from nanollama.gate.documents import read_text

MANIFESTS = {"checklist.chk": "md5", "SHA256SUMS": "sha256"}
DIGEST_LENGTH = {"md5": 32, "sha256": 64}  # hexadecimal digits


def verify(path: str | Path) -> list[str]:
    """Check every file that a manifest in the folder (or beside the file) lists; returns their names.

    No manifest: an empty list. Raises CheckpointError for a missing or differing file and for an unreadable manifest.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    verified = []
    for manifest, algorithm in MANIFESTS.items():
        gate.require_file(folder / manifest)
        if (folder / manifest).is_file():
            for name, digest in read_manifest(folder / manifest, algorithm).items():
                _check(folder / manifest, folder / name, algorithm, digest)
                verified.append(name)
    return sorted(set(verified))


def read_manifest(path: Path, algorithm: str) -> dict[str, str]:
    """Lines of `digest  name` (a `*` before the name marks binary mode) -> name: digest."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror}): remove it") from None
    found = {}
    for line in filter(str.strip, lines):
        match = re.fullmatch(rf"([0-9a-fA-F]{{{DIGEST_LENGTH[algorithm]}}}) [ *](.+)", line.rstrip())
        if match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            raise CheckpointError(
                path, f"line {line[:80]!r} is no {algorithm} digest and file name: remove the manifest"
            )
        found[match[2]] = match[1].lower()
    return found


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file, read once in blocks."""
    gate.require_file(path)
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _check(manifest: Path, path: Path, algorithm: str, expected: str) -> None:
    try:
        found = file_digest(path, algorithm)
    except OSError as error:
        raise CheckpointError(path, f"is listed in {manifest.name} but cannot be read ({error.strerror})") from None
    if found != expected:
        raise CheckpointError(
            path, f"has {algorithm} {found[:12]}..., {manifest.name} says {expected[:12]}...: download it again"
        )
