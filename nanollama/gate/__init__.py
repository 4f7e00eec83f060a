"""What a file is, by its first bytes and not by its name; what to do about those that are no checkpoint; prompts.

Everything that was downloaded passes here before a library sees it, on the reference's way too: documents.py reads
JSON and texts, archive.py and pickles.py walk a .pth, tokenizers.py and worker.py hold a tokenizer.json within limits.
It computes nothing: what it lets through is read by each side for itself.

python -c "from nanollama.gate import kind_of; from pathlib import Path; print(kind_of(Path('x.gguf')))"
"""

import json
import re
import reprlib
import stat
import struct
import zipfile
from pathlib import Path

UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".opdownload", ".tmp")
LLAMA2C = struct.pack("<I", 0x616B3432)  # "ak42"
PICKLES = (b"PK\x03\x04", b"\x80\x02")  # torch's zip, and its pickle of before 1.6
GGML = (b"lmgg", b"fmgg", b"tjgg")  # ggml, ggmf and ggjt as little-endian numbers
# In lower case: pages, and the words with which the hub refuses a file.
PAGES = re.compile(rb'<!doctype|<html|<head|<\?xml|{"error|entry not found|invalid |access to |not found')
ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")


class CheckpointError(ValueError):
    """A file that cannot be used. The message is one line: where, what, how to mend."""

    def __init__(self, where: str | Path, what: object) -> None:
        # Libraries put dumps and advice into their messages: whatever comes in, one line of bounded length goes out.
        line = " ".join(f"{where}: {what}".split())
        super().__init__(line if len(line) <= 600 else line[:597] + "...")


# Libraries advise how to load without their checks; a stranger's file is the last for which to do so.
ADVICE = re.compile(
    r"\s*(?:\(1\)|In PyTorch 2\.6|Re-running|Check the documentation|Please file an issue|You can (?:inspect|avoid)"
    r"|Please pass the|[^.:;(]*(?:weights_only|trust_remote_code|safe_globals)).*",
    re.DOTALL,
)
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60
_brief.maxlevel = 3


def shown(value: object) -> str:
    """A stranger's value for a message: its repr, cut before it is made."""
    return _brief.repr(value)


def reason(error: BaseException) -> str:
    """What a library says was wrong, for the inside of a line: without its advice on how to load unsafely."""
    said = ADVICE.sub("", str(error)).strip() or type(error).__name__
    return " ".join(said[:1000].split())[:160]


def require_file(path: Path) -> None:
    """Raises CheckpointError for what is there and is no regular file: pipes would hang, devices never end."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(
                path, f"is a link that leads nowhere ({error.strerror}): put the file there"
            ) from None
        return  # its reader says that it is missing
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise CheckpointError(
            path, f"is {KINDS.get(kind, 'no file')} and not a file: it is not read; put the file there"
        )


def require_inside(path: Path) -> None:
    """Raises CheckpointError for a link out of its folder, but to the hub cache's blobs: what it names is printed."""
    if not path.is_symlink():
        return
    folder, target = path.parent.resolve(), path.resolve()
    homes = [folder, *(up for up in folder.parents if (up / "snapshots").is_dir() and (up / "blobs").is_dir())]
    if not any(target.is_relative_to(home) for home in homes):
        what = f"is a link out of its folder, to {target}: it is not followed; copy the file there"
        raise CheckpointError(path, what)


def kind_of(path: Path) -> str | None:
    """ "gguf", "llama2c", "pt" (a pickle of torch), "safetensors", or None for what none of them begins like.

    Raises CheckpointError for a file that cannot be any.
    """
    refuse_strangers(path)
    head = first_bytes(path)
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(PICKLES):
        return "pt"
    if head[8:10] in (b'{"', b"{ ", b"{}") and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head.startswith(LLAMA2C) or _is_llama2c_header(head):
        return "llama2c"
    return None


def _is_llama2c_header(head: bytes) -> bool:
    """Version 0 has no magic: seven numbers that could be a model's, dim to context."""
    if len(head) < 28:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", head)
    small = all(0 < n < 1 << 12 for n in (layers, heads, kv_heads))
    large = all(0 < n < 1 << 24 for n in (dim, hidden, abs(vocab), context))
    return small and large and dim % heads == 0 == heads % kv_heads


def refuse_strangers(path: Path) -> None:
    """Raises CheckpointError for what people have in place of a model: half a download, a pointer, a web page."""
    if path.suffix in UNFINISHED:
        raise CheckpointError(path, "is an unfinished download, by its name: let it finish, or download it again")
    require_file(path)
    if not path.is_file():
        raise CheckpointError(path, "is no file: give a folder, a .gguf, a .bin or a .pt file")
    if what := _strange(path, first_bytes(path)):
        raise CheckpointError(path, what)


def _strange(path: Path, head: bytes) -> str | None:
    if not head:
        return "is empty (0 bytes), a download that failed: download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        return "is a git-lfs pointer in place of the file: run `git lfs pull` in its folder, or download it again"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if PAGES.match(text):
        return "is a web page or a server's refusal in place of the file: download it again, by the link that downloads"
    if head.startswith(GGML):
        return "is of GGML's time, before GGUF (August 2023): get a GGUF of this model"
    if head.startswith(ARCHIVES) or head[257:262] == b"ustar" or (head[:2] == b"PK" and not _is_pickle(path)):
        return "is a packed archive: unpack it and give the folder or file in it"
    return None


def _is_pickle(path: Path) -> bool:
    """Whether a zip is one of torch's; a broken one may be: its reader says what is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True


def missing(path: Path, what: str) -> CheckpointError:
    """The error for a file that is not there, unless the half of it is."""
    try:
        require_file(path)
    except CheckpointError as error:
        return error
    for suffix in UNFINISHED:
        half = path.with_name(path.name + suffix)
        if half.exists():
            return CheckpointError(half, "is an unfinished download: let it finish, or download it again")
    return CheckpointError(path, what)


def to_safetensors(path: Path) -> str:
    """The advice for a pickle of Hugging Face's, with its command."""
    folder = path if path.is_dir() else path.parent
    save = f"from_pretrained('{folder}').save_pretrained('{folder}-safetensors')"
    code = f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; M.{save}; T.{save}"
    return f'holds weights as a pickle, pytorch_model.bin: write them as safetensors with python -c "{code}"'


def first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


# --- Files of prompts ------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[tuple[int, str | list[int]]]:
    """What `--prompts FILE` means in every command: (line number, text or token ids) of each prompt. Raises ValueError.

    One prompt a line (\\n, \\t, \\r and \\\\ escapes); in a .jsonl: {"prompt": "..."}, or a list of token ids.
    """
    try:  # with universal line ends, and U+2028 is none
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"--prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: byte {error.start} is not UTF-8: save it as UTF-8") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompts {path}: there is no prompt in it: write one a line")
    if path.suffix != ".jsonl":
        return [(number, unescape(line)) for number, line in numbered]
    return [(number, _json_prompt(line, f"--prompts {path}, line {number}")) for number, line in numbered]


def unescape(line: str) -> str:
    r"""\n, \t, \r and \\ become what they stand for; every other backslash stays."""
    escapes = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
    return re.sub(r"\\[ntr\\]", lambda match: escapes[match.group()], line)


def _json_prompt(line: str, where: str) -> str | list[int]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    found = found.get("prompt") if isinstance(found, dict) else found
    if isinstance(found, str) or (isinstance(found, list) and all(type(i) is int for i in found)):
        return found
    raise ValueError(f'{where}: expected a list of token ids such as [128000, 9906], or {{"prompt": "..."}}')
