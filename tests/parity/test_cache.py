"""Traces of the references kept between runs: never another file's, never another version's, never half an entry."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from parity import machine
from parity.candidates import probe
from parity.check import main
from parity.contract import UsageError
from parity.measure import evidence
from parity.run import cache as cache_module
from parity.run import execute, floors
from parity.run.cache import CODE, TraceCache, kept_in, trace_cache
from ports import plain_port

OLD = 1_600_000_000  # seconds since 1970: a file that was not touched just now


def flip(file: Path, at: int = -1) -> None:
    """Change one byte and leave the size and the time of the last change as they were."""
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


class Made:
    """A cache, the files that a case names, and a finished trace."""

    def __init__(self, folder: Path) -> None:
        self.run, self.checkpoint, self.tokenizer = folder / "run", folder / "ckpt", folder / "tok" / "tokenizer.json"
        for file in (self.checkpoint / "consolidated.00.pth", self.checkpoint / "params.json", self.tokenizer):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"some bytes of " + file.name.encode())
            os.utime(file, (OLD, OLD))
        (self.tokenizer.parent / "chat_template.jinja").write_text("{{ messages }}")
        shutil.copytree(CODE, folder / "code")
        self.cache = TraceCache(folder / "traces", 10_000, folder / "code")
        self.out = self.run / "meta"
        (self.out / "fp32").mkdir(parents=True)
        (self.out / "trace.json").write_text("{}")
        (self.out / "fp32" / "head.safetensors").write_bytes(bytes(1000))

    def key(self, **case: object) -> str | None:
        said = {"checkpoint": str(self.checkpoint), "tokenizer": str(self.tokenizer), "device": "cpu", "threads": 1}
        return self.cache.key("reference.meta", [], {**said, **case}, self.run)

    def entry(self, key: str | None) -> Path:
        assert key is not None
        return self.cache.folder / key


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_a_trace_that_was_kept_is_given_again(made: Made) -> None:
    key, again = made.key(), made.run / "again"
    assert not made.cache.restore(key, again)
    made.cache.keep(key, made.out)
    assert made.cache.has(key) and made.cache.restore(key, again)
    assert (again / "fp32" / "head.safetensors").read_bytes() == bytes(1000)
    assert sorted(p.name for p in again.iterdir()) == ["fp32", "trace.json"]


CHANGES: dict[str, Callable[[Made], object]] = {
    "a weight's byte": lambda made: flip(made.checkpoint / "consolidated.00.pth"),
    "a byte of the config": lambda made: flip(made.checkpoint / "params.json"),
    "a byte of the tokenizer": lambda made: flip(made.tokenizer),
    "a byte beside the tokenizer": lambda made: flip(made.tokenizer.parent / "chat_template.jinja"),
    "a new file": lambda made: (made.checkpoint / "generation_config.json").write_text("{}"),
    "a byte of the reference's code": lambda made: flip(made.cache.code / "oracle" / "math.py"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_file_is_another_entry(change: str, made: Made) -> None:
    before = made.key()
    assert before == made.key()
    CHANGES[change](made)
    assert made.key() not in (before, None)


def test_a_version_a_thread_or_another_prompt_is_another_entry(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [made.key(), made.key(threads=2), made.key(prompts=[[1, 2]]), made.key(prompts=[[1, 3]])]
    monkeypatch.setattr(machine, "version", lambda name: "0.0" if name == "transformers" else "1.0")
    keys.append(made.key())
    monkeypatch.setattr(machine, "version", lambda name: "0.1" if name == "transformers" else "1.0")
    keys.append(made.key())
    assert len(set(keys)) == 6 and None not in keys


def test_hashes_are_remembered_of_settled_files_alone(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = cache_module.time.time()
    monkeypatch.setattr(cache_module.time, "time", lambda: clock + 60)
    first, read = made.key(), list[str]()
    sha256 = cache_module._sha256
    monkeypatch.setattr(cache_module, "_sha256", lambda path: read.append(path.name) or sha256(path))  # type: ignore[func-returns-value]
    assert made.key() == first and "consolidated.00.pth" not in read
    monkeypatch.setattr(cache_module.time, "time", lambda: clock)
    flip(made.checkpoint / "consolidated.00.pth")  # just now: another change may leave the same stamps
    assert made.key() != first and made.key() != first
    assert read.count("consolidated.00.pth") == 2


def test_nothing_is_kept_of_an_accelerator(made: Made) -> None:
    assert made.key(device="cuda") is None
    made.cache.keep(None, made.out)
    assert not made.cache.folder.exists() and not made.cache.restore(None, made.run / "again")


def test_a_folder_that_the_user_names_keeps_everything(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made.cache.named = True
    small = made.key()
    monkeypatch.setattr(cache_module, "FILES_BYTES", 10)
    monkeypatch.setattr(cache_module, "_sha256", lambda path: "0" if path.suffix == ".py" else pytest.fail("hashed"))
    key = made.key()
    assert key not in (None, small) and made.key() == key
    os.utime(made.checkpoint / "params.json", (OLD + 1, OLD + 1))
    assert made.key() != key
    made.cache.limit_bytes = 10
    made.cache.keep(key, made.out)
    assert made.cache.restore(key, made.run / "again")


def test_a_later_round_in_the_same_folder_leaves_the_entry_as_it_was(made: Made) -> None:
    """Of a large checkpoint one dtype runs after the other, and each rewrites trace.json."""
    key = made.key()
    made.cache.keep(key, made.out)
    (made.out / "trace.json").write_text('{"dtypes": 2}')
    assert made.cache.restore(key, made.out)  # in the place of what is there
    assert (made.out / "trace.json").read_text() == "{}"
    (made.out / "trace.json").write_text('{"dtypes": 2}')
    assert made.cache.restore(key, made.run / "again")


@pytest.mark.parametrize("what", ["a file", "no place"])
def test_a_folder_that_cannot_be_kept_in_is_one_line(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--keep .*: (is a file|cannot be made)"):
        kept_in(tmp_path / "file" if what == "a file" else tmp_path / "file" / "within")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte": lambda entry: flip(entry / "fp32" / "head.safetensors", 500),
    "half a file": lambda entry: os.truncate(entry / "fp32" / "head.safetensors", 500),
    "a missing file": lambda entry: (entry / "fp32" / "head.safetensors").unlink(),
    "a foreign file": lambda entry: (entry / "fp32" / "embed.safetensors").write_bytes(b"x"),
    "a link": lambda entry: (
        (entry / "trace.json").rename(entry.parent / "moved") and (entry / "trace.json").symlink_to("../moved")
    ),
    "no list": lambda entry: (entry / "entry.json").write_text("[]"),
    "half a list": lambda entry: os.truncate(entry / "entry.json", 20),
    "another's list": lambda entry: (entry / "entry.json").write_text('{"key": "0", "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew(damage: str, made: Made) -> None:
    key, again = made.key(), made.run / "again"
    made.cache.keep(key, made.out)
    shutil.copytree(made.out, made.run / "whole")  # the entry may share its bytes with the trace itself
    DAMAGE[damage](made.entry(key))
    assert not made.cache.restore(key, again)
    assert not made.entry(key).exists() and not again.exists()
    made.cache.keep(key, made.run / "whole")
    assert made.cache.restore(key, again)


def test_half_an_entry_is_none(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_link", full)
    key = made.key()
    with pytest.raises(OSError, match="No space"):
        made.cache.keep(key, made.out)
    assert not made.cache.has(key)
    assert [p.name for p in made.cache.folder.iterdir() if p.is_dir()] == []


def test_the_entries_that_were_not_used_for_longest_go(made: Made) -> None:
    made.cache.limit_bytes = 2500  # two entries
    keys = [made.key(threads=n) for n in (1, 2, 3)]
    for n, key in enumerate(keys[:2]):
        made.cache.keep(key, made.out)
        os.utime(made.entry(key), (OLD + n, OLD + n))
    assert made.cache.restore(keys[0], made.run / "again")  # used now
    made.cache.keep(keys[2], made.out)
    assert [made.cache.has(key) for key in keys] == [True, False, True]
    made.cache.limit_bytes = 500
    made.cache.keep(keys[1], made.out)
    assert not made.cache.has(keys[1])  # larger than all that may be kept: it drives out nothing
    assert made.cache.has(keys[0])


def test_the_bound_is_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOLLAMA_TRACE_BYTES", "8GB")
    with pytest.raises(UsageError, match="NANOLLAMA_TRACE_BYTES=8GB: expected a number of bytes"):
        trace_cache(tmp_path)
    monkeypatch.setenv("NANOLLAMA_TRACE_BYTES", "0")
    assert trace_cache(tmp_path) is None


# --- The command -----------------------------------------------------------------------------------------------------


def test_a_second_try_runs_no_reference_and_judges_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOLLAMA_TRACE_BYTES", "100000000")
    checkpoint, started, measured = tmp_path / "meta", list[str](), list[str]()
    tiny.checkpoint(checkpoint, n_layers=4)
    note_processes(monkeypatch, started)
    real = evidence.measure
    monkeypatch.setattr(evidence, "measure", lambda t, *rest: measured.append(t.folder.name) or real(t, *rest))  # type: ignore[func-returns-value]

    def run(attribute: str, *flags: str) -> dict:
        started.clear()
        measured.clear()
        out, name = tmp_path / "report.json", f"{plain_port.__file__}:{attribute}"
        common = ("--references", "meta", "--dtype", "fp32", "--max_new_tokens", "2", "--checks", "taps,logits")
        main(["--ckpt", str(checkpoint), "--candidate", name, "--json", str(out), *common, *flags])
        return json.loads(out.read_text())

    first = run("load")
    assert first["cached"] == [] and {"reference.meta", "reference.oracle"} <= set(started)
    assert sorted(measured) == ["candidate", "meta"]
    second = run("load")
    assert second["cached"] == ["meta", "oracle"]
    assert started == ["parity.candidates.probe"]  # which stays to be run: torch is imported once, by it
    assert measured == ["candidate"]
    assert second["results"] == first["results"] and second["verdict"] == first["verdict"] == "pass"
    floors = [f for f in (tmp_path / "cache" / "traces").rglob("measured.safetensors") if f.stat().st_size > 20_000]
    for floor in floors:
        flip(floor, floor.stat().st_size // 2)
    assert floors and run("load")["results"] == first["results"] and measured[0] == "meta"
    assert "from the cache, not run again: meta, oracle" in capsys.readouterr().out
    assert run("load", "--cache", "off")["cached"] == [] and "reference.meta" in started
    weights = checkpoint / "consolidated.00.pth"
    flip(weights, weights.stat().st_size // 2)
    (checkpoint / "SHA256SUMS").unlink(missing_ok=True)
    assert run("load")["cached"] == [] and "reference.meta" in started


def test_a_large_check_goes_on_behind_what_it_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "SMALL_BYTES", 0)  # of every checkpoint one process and one dtype after the other
    checkpoint, kept, started = tmp_path / "meta", tmp_path / "kept", list[str]()
    tiny.checkpoint(checkpoint, n_layers=2)
    note_processes(monkeypatch, started)

    def run() -> tuple[int, dict]:
        """How many references and oracles ran, and the results."""
        started.clear()
        out, name = tmp_path / "report.json", f"{plain_port.__file__}:load"
        flags = ["--references", "meta", "--max_new_tokens", "2", "--checks", "taps,logits", "--twin", "off"]
        main(["--ckpt", str(checkpoint), "--candidate", name, "--json", str(out), "--keep", str(kept), *flags])
        return sum(module.startswith("reference.") for module in started), json.loads(out.read_text())["results"]

    def traces() -> list[Path]:
        """Beside what is measured on them (parity/run/floors.py)."""
        return [entry.parent for entry in kept.glob("*/entry.json") if not (entry.parent / floors.FILE).exists()]

    ran, results = run()
    assert ran == len(traces()) > 1
    assert run() == (0, results)
    shutil.rmtree(traces()[0])  # the run was interrupted before this one was there
    assert run() == (1, results)


def test_keep_and_no_cache_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["--keep", str(tmp_path), "--cache", "off"])
    except SystemExit as stop:
        code = stop.code
    assert (code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_a_second_try_names_the_cause_as_the_first_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOLLAMA_TRACE_BYTES", "100000000")
    tiny.checkpoint(tmp_path / "meta", n_layers=4)
    name = f"{plain_port.__file__}:bare_with_wrong_eps"
    flags = ["--references", "meta", "--dtype", "fp32", "--max_new_tokens", "2", "--checks", "logits", "--twin", "off"]
    named = []
    for _ in range(2):
        out = tmp_path / "report.json"
        main(["--ckpt", str(tmp_path / "meta"), "--candidate", name, "--json", str(out), *flags])
        named.append(json.loads(out.read_text())["first_divergence"]["explained"]["named"])
    assert named[0].startswith("the norms' eps is 1e-05, the config says 2e-05") and named[1] == named[0]


def note_processes(monkeypatch: pytest.MonkeyPatch, started: list[str]) -> None:
    """The module of every process that is started."""
    real = execute.start_process

    def noted(label: str, module: str, *rest: object, **more: object) -> object:
        started.append(module)
        return real(label, module, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "start_process", noted)
    monkeypatch.setattr(probe, "start_process", noted)
