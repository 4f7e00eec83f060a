"""The command line guard: every mistake is one line and exit code 2, before anything has run."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from nanollama.cli import run, run_config

CALLS: list[dict[str, Any]] = []


def answer(
    ckpt: str,  # folder of the 100% real model
    *,
    prompt: str = "",  # what to continue
    max_new_tokens: int = 5,
    temperature: float | None = 0.5,
    stream: bool = True,  # print as it comes
    color: bool | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    stop: list[str] | None = None,
    sizes: tuple[int, ...] = (),
    pair: tuple[int, int] = (0, 0),
    out: Path = Path("out"),
) -> int | None:
    """Answer one prompt.

    More about it.
    """
    CALLS.append(dict(locals()))
    if ckpt == "missing":
        Path("/nowhere/params.json").read_text()
    if ckpt == "bad":
        raise ValueError("params.json: dim is -1\n  expected at least 1")
    if ckpt == "bug":
        raise KeyError("tap")
    if ckpt == "stopped":
        raise KeyboardInterrupt
    return 3 if ckpt == "three" else None


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `answer` run with these arguments; CALLS holds what it received."""
    CALLS.clear()
    with pytest.raises(SystemExit) as stop:
        run(answer, argv, prog="prog")
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["m"], {"ckpt": "m"}),
        (["--ckpt", "m"], {"ckpt": "m"}),
        (["m", "--max_new_tokens", "7"], {"max_new_tokens": 7}),
        (["--max-new-tokens=7", "m"], {"max_new_tokens": 7}),
        (["m", "--temperature", "1e-3"], {"temperature": 1e-3}),
        (["m", "--temperature=-1"], {"temperature": -1.0}),
        (["m", "--temperature", "none"], {"temperature": None}),
        (["m", "--prompt", "123"], {"prompt": "123"}),
        (["m", "--prompt", "[1, 2]"], {"prompt": "[1, 2]"}),
        (["m", "--prompt", "a,b"], {"prompt": "a,b"}),
        (["m", "--prompt", "--help me"], {"prompt": "--help me"}),
        (["m", "--prompt", "-"], {"prompt": "-"}),
        (["m", "--prompt="], {"prompt": ""}),
        (["m", "--prompt=a=b"], {"prompt": "a=b"}),
        (["m", "--prompt", " ''\" "], {"prompt": " ''\" "}),
        (["--stream", "m"], {"stream": True, "ckpt": "m"}),
        (["--nostream", "m"], {"stream": False, "ckpt": "m"}),
        (["m", "--no-stream"], {"stream": False}),
        (["m", "--stream=false"], {"stream": False}),
        (["m", "--stream", "False"], {"stream": False}),
        (["--nocolor", "m"], {"color": False}),
        (["--color", "m"], {"color": True, "ckpt": "m"}),
        (["m", "--color=none"], {"color": None}),
        (["m", "--dtype", "bf16"], {"dtype": "bf16"}),
        (["m", "--stop", "a,b", "--stop", "\n"], {"stop": ["a,b", "\n"]}),
        (["m", "--sizes", "1, 2,3"], {"sizes": (1, 2, 3)}),
        (["m", "--out", "a/b"], {"out": Path("a/b")}),
        (["--", "--odd"], {"ckpt": "--odd"}),
        (["m", "--max_new_tokens", "1", "--max_new_tokens", "2"], {"max_new_tokens": 2}),
    ],
)
def test_values_arrive_with_their_types(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: dict[str, Any]
) -> None:
    assert call(capsys, *argv)[0] == 0
    received = {name: CALLS[0][name] for name in expected}
    assert received == expected
    assert {name: type(value) for name, value in received.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: --ckpt is missing (see --help)"),
        (["m", "extra"], "error: unexpected argument 'extra' (see --help)"),
        (["m", "--max_new_token", "3"], "error: unknown flag --max_new_token; did you mean --max_new_tokens? (see"),
        (["m", "--zzz"], "error: unknown flag --zzz (see --help)"),
        (["m", "--noprompt"], "error: unknown flag --noprompt; did you mean --prompt? (see --help)"),
        (["m", "--max_new_tokens", "1.5"], "error: --max_new_tokens: expected a whole number, not '1.5'"),
        (["m", "--temperature", "warm"], "error: --temperature: expected a number, not 'warm'"),
        (["m", "--stream=maybe"], "error: --stream: expected true or false, not 'maybe'"),
        (["m", "--dtype", "fp64"], "error: --dtype: expected one of fp32, bf16, not 'fp64'"),
        (["m", "--sizes", "1,x"], "error: --sizes: expected a whole number, not 'x'"),
        (["m", "--pair", "1"], "error: --pair: expected 2 values with commas between, not '1'"),
        (["m", "--prompt"], "error: --prompt needs a value: STR"),
        (["m", "--nostream=true"], "error: --nostream takes no value"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    code, out, err = call(capsys, *argv)
    assert (code, out, CALLS) == (2, "", [])
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("ckpt", "code", "message"),
    [
        ("bad", 2, "error: params.json: dim is -1 expected at least 1\n"),
        ("missing", 2, "error: /nowhere/params.json: No such file or directory\n"),
        ("stopped", 130, ""),
        ("three", 3, ""),
    ],
)
def test_how_the_function_ends_is_the_exit_code(
    capsys: pytest.CaptureFixture[str], ckpt: str, code: int, message: str
) -> None:
    assert call(capsys, ckpt) == (code, "", message)


@pytest.mark.parametrize("word", ["EROFS", "EIO", "ESTALE", "ENAMETOOLONG", "ENOSPC", "EDQUOT", "EMFILE"])
def test_what_a_disk_refuses_is_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        number = getattr(errno, word)
        raise OSError(number, os.strerror(number), "/mnt/run/state.json")

    with pytest.raises(SystemExit) as stop:
        run(fail, [])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: /mnt/run/state.json: ") and error.count("\n") == 1


def test_another_error_of_the_system_keeps_its_traceback() -> None:
    def fail() -> None:
        raise OSError(errno.EDEADLK, "a bug")

    with pytest.raises(OSError, match="a bug"):
        run(fail, [])


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError):
        call(capsys, "bug")


def test_debug_shows_the_traceback_of_user_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_DEBUG", "1")
    with pytest.raises(ValueError, match="dim is -1"):
        run(answer, ["bad"])


def test_help_takes_its_lines_from_the_comments(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "m", "--help")
    assert (code, CALLS) == (0, [])
    assert out.startswith("usage: prog CKPT [--flag value ...]\n\nAnswer one prompt.\n")
    assert "--ckpt STR" in out
    assert "folder of the 100% real model (required)" in out
    assert "--[no]stream" in out
    assert "print as it comes (default: True)" in out
    assert "--dtype fp32|bf16" in out


def test_commands_are_chosen_by_the_first_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in ((["answer", "m"], 0), (["anwser", "m"], 2), ([], 2), (["--help"], 0), (["answer", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            run({"answer": answer}, argv, prog="prog")
        assert stop.value.code == code
    out, err = capsys.readouterr()
    assert err == "error: unknown command anwser; did you mean answer? (see --help)\n"
    assert "usage: prog answer CKPT" in out


@dataclass(frozen=True)
class Config:
    """Train something."""

    data: str  # folder of token shards
    lr: float = 3e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}: expected more than 0")


def test_a_config_class_makes_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Config] = []

    def code_of(*argv: str) -> object:
        with pytest.raises(SystemExit) as stop:
            run_config(Config, seen.append, argv, prog="train", defaults={"lr": 1e-5})
        return stop.value.code

    assert [code_of("d"), code_of("d", "--lr", "1", "--betas", "0,1", "--notes", "x")] == [0, 0]
    assert seen == [Config("d", lr=1e-5), Config("d", lr=1.0, betas=(0.0, 1.0), notes=["x"])]
    assert [code_of("d", "--lr", "-1"), code_of("--help")] == [2, 0]
    out, err = capsys.readouterr()
    assert err == "error: lr is -1.0: expected more than 0\n"
    assert "peak learning rate (default: 1e-05)" in out


@dataclass(frozen=True)
class Shared:
    depth: int = 1  # how far down
    wide: bool = False


def test_a_parameter_that_is_a_dataclass_stands_for_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def one(name: str, *, shared: Shared = Shared(depth=2), last: int = 0) -> None:
        seen.append((name, shared, last))

    def code_of(*argv: str) -> object:
        with pytest.raises(SystemExit) as stop:
            run({"one": one}, ["one", *argv], prog="prog")
        return stop.value.code

    assert [code_of("a"), code_of("--wide", "b", "--last", "3", "--depth=7")] == [0, 0]
    assert seen == [("a", Shared(2, False), 0), ("b", Shared(7, True), 3)]
    assert [code_of("a", "--depth", "x"), code_of("a", "--shared", "x"), code_of("--help")] == [2, 2, 0]
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "error: --depth: expected a whole number, not 'x' (see --help)"
    assert err.splitlines()[1].startswith("error: unknown flag --shared")
    assert "--depth INT                        how far down (default: 2)" in out


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["generate", "--help"], ["inspect", "--help"], ["typo"]])
def test_answers_that_need_no_model_do_not_import_torch(argv: list[str]) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['nanollama', *{argv!r}]\n"
        "try:\n    runpy.run_module('nanollama', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (2 if argv == ["typo"] else 0)
    assert done.stderr.strip().endswith("False")


def test_a_reader_that_leaves_is_not_an_error() -> None:
    code = "from nanollama.cli import run\ndef f():\n    for i in range(10**6):\n        print(i)\nrun(f)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)
