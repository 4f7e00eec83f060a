"""Kits and logs of strangers: what no kit and no engine writes is one line, before an array of it is believed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fuzz_kit
from parity.contract import UsageError
from parity.kit.arrays import Kit
from parity.kit.check import report
from parity.mismatch.columns import read
from parity.synth.checkpoint import write_manifest

Break = Callable[[Path], object]


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """One whose port passes, in `port` beside it."""
    folder = fuzz_kit.write_kit(tmp_path / "kit")
    (folder / "port").rename(tmp_path / "port")
    return folder


def table(**changes: Any) -> Break:
    """Keys of kit.json; a key with two underscores leads into a list or an object."""

    def edit(folder: Path) -> None:
        found = json.loads((folder / "kit.json").read_text())
        for key, value in changes.items():
            target: Any = found
            *inside, last = [int(part) if part.isdigit() else part for part in key.split("__")]
            for part in inside:
                target = target[part]
            if value is ...:
                del target[last]
            else:
                target[last] = value
        (folder / "kit.json").write_text(json.dumps(found))

    return edit


def text(content: str) -> Break:
    return lambda folder: (folder / "kit.json").write_text(content)


def listed(name: str) -> Break:
    """A line more in SHA256SUMS, which is not written again."""

    def edit(folder: Path) -> None:
        with (folder / "SHA256SUMS").open("a") as file:
            file.write("0" * 64 + f"  {name}\n")

    return edit


def a_pipe(folder: Path) -> None:
    (folder / "weights.f32").unlink(missing_ok=True)
    os.mkfifo(folder / "weights.f32")
    with (folder / "SHA256SUMS").open("a") as file:
        file.write("0" * 64 + "  weights.f32\n")


def a_device(folder: Path) -> None:
    (folder / "weights.f32").unlink()
    (folder / "weights.f32").symlink_to("/dev/zero")


CLAIMS: dict[str, tuple[Break, str]] = {
    "a list": (text("[]"), "holds a JSON list"),
    "deep": (text('{"a":' * 100_000), "nested more than"),
    "a key twice": (text('{"schema": 1, "schema": 2}'), "stands there twice"),
    "NaN": (text('{"schema": NaN}'), "not a JSON number"),
    "another schema": (table(schema="nanollama.kit/9"), "has schema"),
    "no arrays": (table(arrays=...), "arrays is missing"),
    "arrays of texts": (table(arrays=["x"]), "arrays is"),
    "no tokens": (table(sequences=[]), "sequences is"),
    "sequences of texts": (table(sequences=["3"]), "sequences is"),
    "2^60 tokens": (table(sequences=[2**60]), "sequences is"),
    "more tokens than arrays": (table(sequences=[3, 3]), "ask for"),
    "an unknown dtype": (table(dtypes=["fp8"]), "dtypes is"),
    "an unknown reference": (table(references=["meta", ""]), "references is"),
    "an environment without torch": (table(environment={}), "environment.torch is"),
    "2^30 layers": (table(config__n_layers=2**30), "1,073,741,824 layers"),
    "an unknown key of the config": (table(config__ghost=1), "'ghost' is no key"),
    "heads that are no multiple": (table(config__n_kv_heads=3), "config has"),
    "a scaling that is a list": (table(config__rope_scaling=[8.0]), "rope_scaling is"),
    "a weight that is missing": (table(config__n_layers=2), "lacks the weight|has no array|ask for"),
    "gradients of a floor that are a number": (table(noise_floor__0__gradients=-1), "gradients is -1"),
    "an unknown key of a floor": (table(noise_floor__0__ghost=1), "'ghost' is no key"),
    "a width that is a text": (table(config__dim="4"), "config.dim is '4'"),
    "an array elsewhere": (table(arrays__0__file="../x"), "lies in '../x'"),
    "an array at an absolute path": (table(arrays__0__file="/etc/passwd"), "lies in '/etc/passwd'"),
    "an array named as a path": (table(arrays__0__name="../../x"), "name is '../../x'"),
    "an array beyond its file": (table(arrays__0__offset=10**9), "goes beyond its file"),
    "an array before its file": (table(arrays__0__offset=-4), "goes beyond its file"),
    "an immense array": (table(arrays__0__shape=[2**39, 2**39]), "goes beyond its file"),
    "an array of another shape": (table(arrays__0__shape=[5, 3]), "ask for"),
    "an array twice": (table(arrays__1__name="tok_embeddings.weight"), "there twice"),
    "a bound of no array": (table(gates__0__array="nowhere"), "a bound is about"),
    "a bound by another metric": (table(gates__0__metric="eval"), "a bound is about"),
    "a bound of rows beyond": (table(gates__0__rows=10**6), "is about rows"),
    "a bound below nothing": (table(gates__0__noise=-1.0), "is about rows"),
    "KL of what is no logits": (table(gates__0__metric="kl_mean"), "is about logits"),
    "a rate that is a text": (table(training={"lr": "x"}), "training is"),
    "an unknown key of the checkpoint": (table(checkpoint__ghost=1), "'ghost' is no key"),
    "a megabyte for a number": (table(config__dim="x" * 10**6), "config.dim is"),
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_a_kit_that_claims_what_it_has_not_is_one_line(kind: str, kit: Path, tmp_path: Path) -> None:
    """With sums that fit: who changes a kit changes them too."""
    change, part = CLAIMS[kind]
    change(kit)
    (kit / "SHA256SUMS").unlink()
    write_manifest(kit)
    with pytest.raises(UsageError, match=part.replace("^", r"\^")) as refused:
        report(Kit(kit), tmp_path / "port", "fp32")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 900


SUMS: dict[str, tuple[Break, str]] = {
    "a file elsewhere": (listed("../port/logits.f32"), "no file beside it"),
    "an absolute path": (listed("/etc/passwd"), "no file beside it"),
    "the folder itself": (listed(".."), "no file beside it"),
    "a pipe": (a_pipe, "is a pipe"),
    "an endless device": (a_device, "is a device"),
    "a file that is left out": (lambda f: (f / "SHA256SUMS").write_text("0" * 64 + "  kit.json\n"), "does not list"),
    "not UTF-8": (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\xfe"), "is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SUMS)
def test_sums_that_lead_elsewhere_are_one_line(kind: str, kit: Path) -> None:
    change, part = SUMS[kind]
    change(kit)
    with pytest.raises(UsageError, match=part):
        Kit(kit)


def test_the_kit_itself_is_read(kit: Path, tmp_path: Path) -> None:
    assert report(Kit(kit), tmp_path / "port", "fp32").verdict in ("pass", "limited")


# --- Logs of a trainer and an engine ---------------------------------------------------------------------------------

GOOD_IDS, GOOD = "[1, 2, 3]\n", "[null, -0.1, -2.5]\n"
LOGS: dict[str, tuple[str, str, str]] = {
    "ids deep": ("[" * 100_000 + "\n", GOOD, "line 1: not JSON"),
    "an id of 2^70": (f"[1, 2, {2**70}]\n", GOOD, "token ids"),
    "a negative id": ("[1, -2, 3]\n", GOOD, "token ids"),
    "ids of a megabyte": ('["' + "x" * 10**6 + '", 2]\n', GOOD, "token ids"),
    "a value of 10^400": (GOOD_IDS, "[null, -0.1, 1" + "0" * 400 + "]\n", "no log-probability"),
    "a value of 10^5000": (GOOD_IDS, "[null, -0.1, 1" + "0" * 5000 + "]\n", "not JSON"),
    "infinity": (GOOD_IDS, "[null, -0.1, Infinity]\n", "no log-probability"),
    "NaN": (GOOD_IDS, "[null, -0.1, NaN]\n", "no log-probability"),
    "values of a megabyte": (GOOD_IDS, '{"logprobs": "' + "x" * 10**6 + '"}\n', "list of log-probabilities"),
    "true": (GOOD_IDS, "[null, true, -0.1]\n", "no log-probability"),
    "not UTF-8": (GOOD_IDS, "\udcff\n", "not UTF-8"),
    "nothing but masks": (GOOD_IDS, "[null, -Infinity, -1e9]\n", "list no token in common"),
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_hostile_log_is_one_line(kind: str, tmp_path: Path) -> None:
    ids, values, part = LOGS[kind]
    for name, content in (("ids", ids), ("a", values), ("b", GOOD)):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=part) as refused:
        read(tmp_path / "ids", tmp_path / "a", tmp_path / "b")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 900


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    (tmp_path / "ids").write_text(GOOD_IDS)
    with pytest.raises(UsageError, match="is a pipe"):
        read(tmp_path / "ids", tmp_path / "a", tmp_path / "a")
