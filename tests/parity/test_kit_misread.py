"""Right numbers in a layout of another language: the check fails, and says what to change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kit_cases
from kit_cases import check
from parity.kit import make as command
from parity.kit.arrays import Kit
from parity.kit.misread import layout

TAP = "layers.0.q"  # (302, 4, 16)
Array = np.ndarray


def padded(x: Array) -> bytes:
    rows = np.zeros((4, 271, 4, 16), np.float32)
    for i, (begin, n) in enumerate(zip((0, 7, 20, 31), (7, 13, 11, 271), strict=True)):
        rows[i, :n] = x[begin : begin + n]
    return rows.tobytes()


def npy(x: Array) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


bf16 = lambda x: torch.from_numpy(x).bfloat16().view(torch.int16).numpy().tobytes()
halves = lambda x: x.reshape(302, 4, 8, 2).transpose(0, 1, 3, 2).tobytes()
WAYS: dict[str, tuple[Callable[[Array], bytes], str]] = {
    "doubles": (lambda x: x.astype("<f8").tobytes(), "as float64"),
    "big-endian": (lambda x: x.astype(">f4").tobytes(), "as big-endian float32"),
    "float16": (lambda x: x.astype("<f2").tobytes(), "as float16"),
    "bf16": (bf16, "as bf16"),
    "text": (lambda x: "\n".join(map(str, x.flatten())).encode(), "as text"),
    "comma separated": (lambda x: ",".join(map(str, x.flatten())).encode(), "as text"),
    "a .npy file": (npy, "in a .npy file"),
    "columns first": (lambda x: x.transpose(2, 1, 0).tobytes(), "in the order 16 x 4 x 302"),
    "heads first": (lambda x: x.transpose(1, 0, 2).tobytes(), "in the order 4 x 302 x 16"),
    "pairs as Hugging Face": (halves, "features j and j + D/2"),
    "padded rows": (padded, "rows padded to 271 tokens"),
    "a header": (lambda x: bytes(256) + x.tobytes(), "a header of 256 bytes"),
    "a tail": (lambda x: x.tobytes() + bytes(4), "4 bytes too many at the end"),
    "a part": (lambda x: x[:31].tobytes(), "in the first 31 of 302 rows"),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_layout_is_named(way: str, tmp_path: Path) -> None:
    write, words = WAYS[way]
    folder, out = kit_cases.made()[1], tmp_path / "out"
    out.mkdir()
    (out / f"{TAP}.f32").write_bytes(write(Kit(folder).get(TAP).float().numpy()))
    code, report = check(folder, {}, out)
    assert (code, report["first_divergence"]["tap"]) == (1, TAP)
    cause = report["first_divergence"]["probable_cause"]
    assert "the numbers are right " in cause and words in cause


@pytest.mark.parametrize("data", [b"", b"1 2 3", bytes(77_312), b"\x93NUMPY\x01\x00nonsense", b"\xff" * 77_312])
def test_what_holds_other_numbers_is_not_named(data: bytes, tmp_path: Path) -> None:
    kit, path = Kit(kit_cases.made()[1]), tmp_path / "x.f32"
    path.write_bytes(data)
    assert layout(path, kit.get(TAP), kit.table["sequences"]) is None


def test_another_array_is_not_named(tmp_path: Path) -> None:
    kit, path = Kit(kit_cases.made()[1]), tmp_path / "x.f32"
    path.write_bytes(kit.get("layers.0.q_rope").float().numpy().tobytes())
    assert layout(path, kit.get(TAP), kit.table["sequences"]) is None


def test_what_is_no_number_is_counted(tmp_path: Path) -> None:
    wrong = Kit(kit_cases.made()[1]).get(TAP).float()
    wrong[5, 1, 2], wrong[9, 0, 0] = torch.nan, torch.inf
    code, report = check(kit_cases.made()[1], {TAP: wrong}, tmp_path / "out")
    cause = report["first_divergence"]["probable_cause"]
    assert code == 1 and cause.startswith("2 of 19328 are no numbers (NaN or infinite), in 2 rows, first in row 5; ")


@pytest.mark.parametrize("name", ["logits.npy", "layers.0.q.txt", "embed.f64"])
def test_a_file_of_another_ending_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(b"1 2 3")
    assert command.main(["--check", str(kit_cases.made()[1]), "--port", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"write it as raw little-endian float32, {Path(name).stem}.f32" in error
