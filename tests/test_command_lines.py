"""What holds of every command line: any text arrives as typed, switches read alike, each flag is explained."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollama.cli import Command, UsageError, help_text, read

# Module -> the function or dataclass whose signature is the line.
SPECS = [
    ("nanollama.__main__", "generate"),
    ("nanollama.__main__", "chat"),
    ("nanollama.__main__", "inspect"),
    ("nanollama.__main__", "convert"),
    ("nanollama.serve.command", "serve"),
    ("reference.command", "Flags"),
    ("reference.oracle.__main__", "answer"),
    ("reference.mistakes.explain", "explain_case"),
    ("parity.check", "Flags"),
    ("parity.ci", "Flags"),
    ("parity.kit.make", "Flags"),
    ("parity.mutants.evaluate", "run"),
    ("parity.peers.__main__", "judge_peers"),
    ("parity.synth.checkpoint", "write_seeded"),
    ("finetune.config", "TrainConfig"),
    ("finetune.plan", "main"),
    ("finetune.prepare.__main__", "main"),
    ("benchmarks.decode", "main"),
    ("benchmarks.frozen", "main"),
    ("benchmarks.gpu", "main"),
    ("benchmarks.memory_plan", "main"),
    ("benchmarks.methods", "distil"),
    ("benchmarks.plots", "main"),
    ("benchmarks.random_shapes", "main"),
    ("benchmarks.real", "main"),
    ("benchmarks.resume_kills", "main"),
    ("benchmarks.tinyshakespeare_vs_transformers", "main"),
    ("benchmarks.train", "main"),
]


@dataclass(frozen=True)
class Line:
    ckpt: str
    prompt: str = ""
    stop: list[str] | None = None
    top: int = 0
    twin: Literal["on", "off"] = "on"
    quiet: bool = False


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))  # all that a process can be given
ODD = st.sampled_from(
    ["", "-", "--", "--help", "-1", "1e3", "[1]", "007", "None", "--prompt", "--noquiet", "a=b", "-x"]
)


@given(TEXTS | ODD, TEXTS | ODD, st.lists(TEXTS | ODD, min_size=1))
def test_any_text_arrives_as_it_was_typed(ckpt: str, prompt: str, stop: list[str]) -> None:
    expected = Line(ckpt, prompt, stop)
    apart = [word for text in stop for word in ("--stop", text)]
    joined = [f"--stop={text}" for text in stop]
    assert read(Line, ["--prompt", prompt, *apart, "--ckpt", ckpt]) == expected
    assert read(Line, [f"--ckpt={ckpt}", *joined, f"--prompt={prompt}"]) == expected
    assert read(Line, ["--prompt", prompt, *joined, "--", ckpt]) == expected


@pytest.mark.parametrize(
    ("typed", "twin"),
    [
        (["--twin"], "on"),
        (["--twin", "on"], "on"),
        (["--twin", "off"], "off"),
        (["--twin=off"], "off"),
        (["--notwin"], "off"),
        (["--no-twin", "--quiet"], "off"),
    ],
)
def test_a_choice_of_on_and_off_is_a_switch(typed: list[str], twin: str) -> None:
    assert read(Line, ["m", *typed]).twin == twin


@pytest.mark.parametrize(
    ("typed", "quiet"), [(["--quiet", "on"], True), (["--quiet", "off"], False), (["--quiet=no"], False)]
)
def test_a_switch_takes_on_and_off(typed: list[str], quiet: bool) -> None:
    assert read(Line, [*typed, "m"]) == Line("m", quiet=quiet)


@pytest.mark.parametrize("number", ["-3", "-0", "+4"])
def test_a_negative_number_is_a_value(number: str) -> None:
    assert read(Line, ["m", "--top", number]).top == int(number)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--twin", "--ckpt=m", "--twn"], "unknown flag --twn; did you mean --twin?"),
        (["m", "--twin", "maybe"], "--twin: expected one of on, off, not 'maybe'"),
        (["m", "--top", "--quiet"], "--top: expected a whole number, not '--quiet'"),
        (["m", "-x"], "unexpected argument '-x'"),
        (["m", "--", "--prompt", "a"], "unexpected argument '--prompt'"),
        (["m", "--=x"], "unknown flag --"),
        (["m", "__class__"], "unexpected argument '__class__'"),
    ],
)
def test_a_wrong_line_is_one_error(typed: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(Line, typed)
    assert str(caught.value) == f"{said} (see --help)"


def command(module: str, name: str) -> Command:
    spec = getattr(importlib.import_module(module), name)
    return Command(spec, spec)


@pytest.mark.parametrize(("module", "name"), SPECS, ids=str)
def test_help_explains_every_flag_and_names_its_default(module: str, name: str) -> None:
    found = command(module, name)
    lines = [line.strip() for line in help_text(found, "prog").splitlines()]
    for flag in found.parameters():
        [line] = [line for line in lines if line.startswith((f"--{flag} ", f"--[no]{flag} "))]
        words = line.split()[1 if line.startswith("--[no]") else 2 :]
        assert words[0] not in ("(default:", "(required)", "default:"), f"--{flag} is not explained: {line}"
        assert "default: " in line or "(required)" in line, f"--{flag} has no default: {line}"


@pytest.mark.parametrize(("module", "name"), SPECS, ids=str)
def test_an_unknown_flag_reads_alike_everywhere(module: str, name: str) -> None:
    with pytest.raises(UsageError, match=r"^unknown flag --no-such-flag(; did you mean .*\?)? \(see --help\)$"):
        command(module, name).run(["--no-such-flag", "x"])


@pytest.mark.parametrize(("module", "name"), [spec for spec in SPECS if spec[0].startswith("benchmarks")])
def test_json_is_a_file_in_every_benchmark(module: str, name: str) -> None:
    parameters: dict[str, Any] = command(module, name).parameters()
    assert "json" not in parameters or parameters["json"].annotation == Path | None
