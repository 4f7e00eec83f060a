"""What changes while it is read: files exchanged behind their check, cut, or put back, on both ways."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile import link, pipe, write
from nanollama import gate
from nanollama.checkpoint import CheckpointError, open_checkpoint
from nanollama.gate import archive
from reference.files import open_folder
from reference.files.weights import Unusable

SIDES = {"ours": (open_checkpoint, CheckpointError), "reference": (open_folder, Unusable)}
Change = Callable[[Path], object]


def other(path: Path) -> None:
    """Another good file under this name."""
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def there_and_back(path: Path) -> None:
    """Another file for a moment; then the first one again, with its times."""
    aside = path.with_name("aside")
    path.rename(aside)
    shutil.copy2(aside, path)
    aside.replace(path)


def changed_once(monkeypatch: pytest.MonkeyPatch, owner: object, check: str, name: str, change: Change) -> None:
    """Right behind this check of the file of that name."""
    real, left = getattr(owner, check), [change]

    def checked(path: Path) -> object:
        found = real(path)
        if path.name == name and left:
            left.pop()(path)
        return found

    monkeypatch.setattr(owner, check, checked)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("change", [lambda path: link(path, "/etc/passwd"), pipe, lambda path: link(path, "/dev/zero")])
def test_a_document_exchanged_behind_its_check_is_not_read(
    side: str, change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (opened, refusal) = write(tmp_path / "model", "hf"), SIDES[side]
    changed_once(monkeypatch, gate, "require_inside", "config.json", change)
    with pytest.raises(refusal, match=r"config\.json: was changed or exchanged while it was read") as said:
        opened(folder)
    assert "root:" not in str(said.value)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("change", [other, cut, there_and_back])
def test_weights_exchanged_behind_their_check_are_not_loaded(
    side: str, change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (opened, refusal) = write(tmp_path / "model", "meta"), SIDES[side]
    changed_once(monkeypatch, archive, "check", "consolidated.00.pth", change)
    with pytest.raises(refusal, match=r"consolidated\.00\.pth: was changed or exchanged while it was read"):
        opened(folder)


@pytest.mark.parametrize("side", SIDES)
def test_a_file_that_nobody_changes_opens_by_a_link_too(side: str, tmp_path: Path) -> None:
    folder, (opened, _) = write(tmp_path / "model", "meta"), SIDES[side]
    (folder / "params.json").rename(folder / "real.json")
    link(folder / "params.json", "real.json")
    assert list(opened(folder).weights)


def test_a_folder_in_a_documents_place_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "hf")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    for opened, refusal in SIDES.values():
        with pytest.raises(refusal, match=r"(?i)is a directory"):
            opened(folder)
