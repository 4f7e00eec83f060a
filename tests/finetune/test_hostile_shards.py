"""A distributed save of a stranger's: its list is a pickle, its parts are archives; neither may do or claim more."""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tiny
from finetune.config import TrainConfig, resolve
from finetune.data.packing import Cursor
from finetune.errors import UserError
from finetune.optim import make_optimizer
from finetune.parallelize import World
from finetune.resume import Progress, RunFolder
from finetune.save import Saver
from finetune.shards import described, read_shards

NAME = "norm.weight"


class Saved:
    """Two tensors in shards, whose list and parts can be changed as who sends them would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tensors = {NAME: torch.arange(6.0), "w": torch.arange(12.0).view(4, 3)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        self.listed: Any = pickle.loads((folder / ".metadata").read_bytes())

    def write(self) -> None:
        (self.folder / ".metadata").write_bytes(pickle.dumps(self.listed))

    @property
    def entry(self) -> Any:
        return self.listed.state_dict_metadata["w"]

    @property
    def place(self) -> Any:
        return next(place for index, place in self.listed.storage_data.items() if index.fqn == "w")

    def put(self, part: bytes) -> None:
        """Other bytes for w, listed as such."""
        file = self.folder / self.place.relative_path
        self.place.offset, self.place.length = file.stat().st_size, len(part)
        file.write_bytes(file.read_bytes() + part)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path / "shards")


def stored(value: Any) -> bytes:
    made = BytesIO()
    torch.save(value, made)
    return made.getvalue()


def packed(part: bytes) -> bytes:
    """The same archive with its records compressed."""
    made = BytesIO()
    with zipfile.ZipFile(BytesIO(part)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return made.getvalue()


def resized(saved: Saved, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(saved.entry.chunks[0], name, torch.Size(value))


KINDS: dict[str, tuple[Callable[[Saved], object], str]] = {
    "a part is missing": (lambda s: s.entry.chunks.clear(), "leave numbers of it out, or overlap"),
    "a part is smaller": (lambda s: resized(s, sizes=(3, 3)), "leave numbers of it out, or overlap"),
    "a part stands there twice": (lambda s: s.entry.chunks.append(s.entry.chunks[0]), "leave numbers"),
    "a part begins later": (lambda s: resized(s, offsets=(1, 0)), "leave numbers of it out, or overlap"),
    "a part lies in no file": (lambda s: s.listed.storage_data.clear(), "lies in no file"),
    "bytes behind the file": (lambda s: setattr(s.place, "length", 10**9), "asks for bytes"),
    "bytes before the file": (lambda s: setattr(s.place, "offset", -1), "asks for bytes"),
    "a file elsewhere": (lambda s: setattr(s.place, "relative_path", "../x.distcp"), "no name of a file beside it"),
    "an absolute path": (lambda s: setattr(s.place, "relative_path", "/etc/passwd"), "no name of a file beside it"),
    "a file that is none": (lambda s: setattr(s.place, "relative_path", "y.distcp"), "is missing"),
    "a way to unpack": (lambda s: setattr(s.place, "transform_descriptors", ["zstd"]), "asks for bytes"),
    "a size of 2^80": (lambda s: setattr(s.entry, "size", torch.Size((2**40, 2**40))), "a size of"),
    "another dtype": (lambda s: setattr(s.entry.properties, "dtype", torch.complex64), "asks for 'torch.complex64'"),
    "integers for floats": (lambda s: s.put(stored(torch.ones(4, 3, dtype=torch.int64))), "another than the list says"),
    "another shape": (lambda s: s.put(stored(torch.ones(1, 3))), "another than the list says"),
    "a dict for a tensor": (lambda s: s.put(stored({"a": 1})), "another than the list says"),
    "a compressed part": (lambda s: s.put(packed(stored(torch.ones(4, 3)))), "is compressed"),
    "a part that is none": (lambda s: s.put(b"x" * 100), "is truncated or not a .pth file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_save_is_one_line(kind: str, saved: Saved) -> None:
    change, part = KINDS[kind]
    change(saved)
    saved.write()
    with pytest.raises(UserError, match=part) as refused:
        read_shards(saved.folder, {})
    assert "\n" not in str(refused.value)


def test_the_save_itself_is_read(saved: Saved) -> None:
    saved.write()
    assert described(saved.folder) == {NAME: ((6,), torch.float32), "w": ((4, 3), torch.float32)}
    weights, states = read_shards(saved.folder, {})
    assert torch.equal(weights["w"], torch.arange(12.0).view(4, 3)) and states == {}


def named(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls what the name leads to; a dot in it leads inside of a class."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93" + pickle.dumps(arguments, 2)[2:-1] + b"R."


FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@pytest.mark.parametrize(
    "call",
    [
        ("posix", "system", "touch PLACE"),
        ("pathlib", "PosixPath.touch", "PLACE"),
        (FILESYSTEM, "Path.touch", "PLACE"),  # a class of the module, whose methods a dot leads to
        (FILESYSTEM, "FileSystem.mkdir", None, "PLACE"),
        (FILESYSTEM, "FileSystemWriter", "PLACE"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties.__setstate__", None, None),
    ],
    ids=lambda call: call[1],
)
def test_a_list_of_shards_runs_no_code(call: tuple[Any, ...], tmp_path: Path) -> None:
    place = tmp_path / "ran"
    arguments = [str(text).replace("PLACE", str(place)) if text else text for text in call[2:]]
    (tmp_path / ".metadata").write_bytes(named(call[0], call[1], *arguments))
    with pytest.raises(UserError, match=r"asks for .*, which no such list needs: it is not as a run wrote it"):
        described(tmp_path)
    assert not place.exists()


NESTED = b")" + b"\x94h\x00\x86" + b"".join(b"\x94" + b"h" + bytes([n]) + b"\x86" for n in range(1, 60))


@pytest.mark.parametrize(
    ("pickled", "part"),
    [
        (b"", "damaged pickle"),
        (b"\x80\x04.", "no one value at its end"),
        (b"\x80\x04}" + NESTED + b"Ns.", "lacks a record of the kind Metadata"),  # a key that hashes for ever
        (b"\x80\x04]\x94h\x00a.", "lacks a record of the kind Metadata"),  # a list that holds itself
        (b"\x80\x04\x82\x01.", "opcode EXT1"),
        (b"\x80\x04X\xff\xff\xff\x7f.", "damaged pickle"),
        (b"\x80\x04(", "no one value|damaged pickle"),
        (b"\x80\x04}0.", "opcode POP"),
    ],
)
def test_a_list_that_is_none_is_one_line(pickled: bytes, part: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickled)
    with pytest.raises(UserError, match=part) as refused:
        described(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_run_does_not_go_on_from_a_part_that_was_changed(tmp_path: Path) -> None:
    config = resolve(TrainConfig(init="260K", max_steps=10, save="sharded"), "cpu", 1)
    folder, model = RunFolder(tmp_path, config), tiny.model(n_layers=1).train()
    optimizer = make_optimizer(model, config)
    model(torch.arange(5)[None]).square().mean().backward()
    optimizer.step()
    Saver(folder, World(torch.device("cpu")), "data", 0).save(
        Progress(1, 4, Cursor(0, 0, 1)), model, optimizer, wait=True
    )
    assert folder.restore_(model, optimizer, "data").step == 1
    (file,) = (folder.checkpoint(1) / "shards").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\1\2") + 46] ^= 1  # a record's name in the directory of its archive
    file.write_bytes(data)
    with pytest.raises(UserError, match="to continue from an older one") as refused:
        folder.restore_(model, optimizer, "data")
    assert "\n" not in str(refused.value)
