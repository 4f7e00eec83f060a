"""Names from strangers' files through every printer: a terminal, a log, an XML or HTML reader gets text, no orders."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from tqdm import tqdm

import tiny
from finetune.data.left_out import LeftOut
from nanollama import cli, describe, options
from nanollama.checkpoint import open_checkpoint
from nanollama.printable import Printed, error_line, printable, printable_all, printed, show_traceback
from parity.contract import Result, Status
from parity.measure.tolerances import BOUNDS
from parity.mutants import matrix
from parity.pytest_plugin import describe as describe_result
from parity.report import html, terminal
from parity.report.junit import junit
from parity.report.model import CheckpointEntry, Curve, Divergence, NoiseFloor, Report, Tokens

# What a name does to a terminal, a log or a page that shows it as it is.
HOSTILE = {
    "title": "wq\x1b]0;owned\x07",
    "clear": "wq\x1b[2J\x1b[H",
    "colour": "wq\x1b[8mhidden\x1b[0m",
    "c1": "wq\x9b31m",
    "overwritten": "wq\rverdict      PASS",
    "a second line": "wq\nverdict      PASS: all is well",
    "backspaces": "wq\b\b  ",
    "nul": "wq\x00.weight",
    "delete": "wq\x7f",
    "overridden": "wq\u202egnp.exe",
    "isolated": "wq\u2066x\u2069",
    "half a pair": "wq\ud800",
    "line separator": "wq\u2028error: x",
    "script": "<script>document.title='owned'</script>",
    "attribute": "\" onmouseover=\"document.title='owned'",
    "workflow command": "wq\n::set-output name=x::y",
    "megabytes": "A" * 3_000_000,
}
NAMES = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def is_text(shown: str, lines: int | None = None, most: int = 60_000) -> bool:
    """Nothing in it but printable characters and, where they are ours, line feeds."""
    counted = lines is None or len(shown.splitlines()) == lines
    return counted and len(shown) < most and all(c.isprintable() or c == "\n" for c in shown)


@NAMES
def test_a_value_is_one_short_line(name: str) -> None:
    assert printable(name).isprintable() and len(printable(name)) < 500
    assert printable("layers.0.wq") == "layers.0.wq" and printable("ชื่อ 模型 é") == "ชื่อ 模型 é"
    printable(name).encode()


@NAMES
@pytest.mark.parametrize("where", ["{}: unknown key", "a.json: unknown keys {0}, {0}, {0}"])
def test_an_error_is_one_line(name: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError(where.format(name))

    assert cli.execute(fail, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and is_text(said, 1, 4200) and said.count("\n") == 1


@NAMES
def test_a_file_that_is_not_there_is_one_line(name: str) -> None:
    assert is_text(error_line(FileNotFoundError(2, "No such file or directory", name)), 1, 4200)


@NAMES
def test_a_flag_that_is_none_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def nothing(*, seed: int = 0) -> None:
        pass

    assert cli.execute(nothing, [f"--{name}", "3"]) == 2
    assert is_text(capsys.readouterr().err, 1, 4200)


@NAMES
def test_a_traceback_shows_no_orders(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError(name)
    except KeyError as error:
        show_traceback(KeyError, error, error.__traceback__)
    assert not set(capsys.readouterr().err) & set("\x1b\x9b\x07\x00\r\u202e")


@NAMES
def test_inspect_shows_names_and_no_orders(name: str, tmp_path: Path) -> None:
    facts = describe.describe(open_checkpoint(tiny.checkpoint(tmp_path / "ckpt")))
    lines = len(describe.as_text(facts).splitlines())
    facts["tensors"] = {name: facts["tensors"].popitem()[1]} | facts["tensors"]
    facts["path"] = facts["dtype"] = name
    facts["notices"], facts["verified"] = [name], [name]
    facts["tokenizer"] = {"path": name, "kind": name}
    facts["config"] |= {name: name}
    kept = len(describe._grouped(facts["tensors"])) - len(describe._grouped({name: facts["tensors"][name]}))
    assert is_text(describe.as_text(facts))
    assert len(describe.as_text(facts).splitlines()) <= lines + kept + 5
    assert is_text(describe.summary(facts | {"dtype": "bf16"}), 1)


@NAMES
def test_notes_beside_the_answer_are_lines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options.say(f"note: {name}")
    assert is_text(capsys.readouterr().err, 1, 5000)


@NAMES
def test_rows_of_data_are_named_in_lines(name: str) -> None:
    said: list[str] = []
    left_out = LeftOut(seen=1)
    for number in (1, 2):
        left_out.add(f"row {number}: {name}")
    left_out.report("dialogues", "skip", said.append)
    assert len(said) == 3 and all(line.isprintable() and len(line) < 600 for line in said)


# --- What a model says -----------------------------------------------------------------------------------------------


def through(*pieces: str, bars: bool = False, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = Printed(io.TextIOWrapper(raw, encoding=encoding, newline=""), bars)
    for piece in pieces:
        stream.write(piece)
    stream.end()
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    "text",
    ["Once\tupon\na time", "\r\n", "ชื่อ 模型 👩‍🚀 שלום é", "a\u200e\u00a0b\u2028c", '{"text": "\\u001b"}', ""],
)
def test_text_streams_as_it_is(text: str) -> None:
    assert through(text) == text
    assert through(*text) == text  # in pieces of one character, a line end in two


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (("\x1b[2J", "gone"), "\\u001b[2Jgone"),
        (("a\x1b", "]0;t\x07"), "a\\u001b]0;t\\u0007"),
        (("100%\rverdict PASS",), "100%\\u000dverdict PASS"),
        (("a\r",), "a\\u000d"),
        (("a\r", "\nb"), "a\r\nb"),
        (("\x9b31m\x7f\u202e\ud800",), "\\u009b31m\\u007f\\u202e\\ud800"),
    ],
)
def test_what_steers_a_terminal_is_spelled_out(pieces: tuple[str, ...], shown: str) -> None:
    assert through(*pieces) == shown


def test_a_terminal_of_few_letters_gets_spellings() -> None:
    assert through("naïve 模", encoding="ascii") == "na\\xefve \\u6a21"


def test_json_stays_json() -> None:
    text = "a\x9b\x7f\u202e\ud800\x1b\r"
    assert json.loads(through(json.dumps({"text": text}, ensure_ascii=False))) == {"text": text}


def test_a_command_prints_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        for piece in ("\x1b", "[2J", "hi\r", "\n"):
            print(piece, end="", flush=True)
        print("\x1b[1mnote", file=sys.stderr)

    streams = sys.stdout, sys.stderr
    assert cli.execute(talk, []) == 0
    assert (sys.stdout, sys.stderr) == streams
    said = capsys.readouterr()
    assert (said.out, said.err) == ("\\u001b[2Jhi\r\n", "\\u001b[1mnote\n")


def test_progress_bars_move_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    def bars() -> None:
        for _ in tqdm(range(3), desc="outer\x1b[2J", mininterval=0):
            for _ in tqdm(range(2), mininterval=0, leave=False):
                pass

    assert cli.execute(bars, []) == 0
    shown = capsys.readouterr().err
    assert "\x1b[2J" not in shown and "\r" in shown and "\x1b[A" in shown and "100%" in shown


def test_streams_are_wrapped_once(capsys: pytest.CaptureFixture[str]) -> None:
    with printed():
        inner = sys.stdout
        with printed():
            assert sys.stdout is inner
        print("é")
    assert capsys.readouterr().out == "é\n"


# --- Reports ---------------------------------------------------------------------------------------------------------


def report_with(name: str) -> Report:
    """Every text that comes from outside is the name."""
    config = dict.fromkeys(("n_layers", "dim", "n_heads", "head_dim", "n_kv_heads", "hidden_dim", "vocab_size"), 2)
    config |= {"rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-5, "tied": False, name: name}
    bound = BOUNDS["G3.taps"].value
    results = [
        Result("logits", "G3", Status.FAIL, "meta", "fp32", name, name, 2.0, bound, name, name, name),
        Result("taps", "G3", Status.ERROR, "meta", "fp32", name, name, where=name, reason=name),
        Result("taps", "G3", Status.SKIP, "meta", "fp32", name, name, reason=name),
    ]
    return Report(
        verdict="fail",
        why=name,
        candidate=name,
        references=["meta", "hf"],
        checkpoint=CheckpointEntry(name, name, config, 7),
        environment={"torch": name, "transformers": name, name: name},
        results=results,
        first_divergence=Divergence("layers.0.q", "meta", "fp32", name, path=name, operations=[name]),
        errata=[name],
        notices=[name],
        cached=[name],
        noise_floor=[NoiseFloor("meta", "hf", "fp32", 1.0, name, 1.0, 1.0, (1.0, name))],
        rho={name: Curve("meta", "fp32", name, {"layers.0.q": 1.0, "logits": 3.0, name: 2.0})},
        training={name: [1.0]},
        tokens=Tokens(1, 1, 1, {"fp32": 1.0}),
    )


@NAMES
def test_the_terminal_report_has_its_own_lines_alone(name: str) -> None:
    plain = terminal.render(report_with("plain"))
    assert is_text(terminal.render(report_with(name)), len(plain.splitlines()), 300_000)


@NAMES
def test_junit_is_xml_of_text(name: str) -> None:
    page = junit(report_with(name))
    texts = [*ET.fromstring(page).itertext(), *(v for e in ET.fromstring(page).iter() for v in e.attrib.values())]
    assert all(is_text(text) for text in texts) and page.encode()
    if not name.startswith("<"):
        assert is_text(page, len(junit(report_with("plain")).splitlines()), 300_000)


@NAMES
def test_html_holds_no_markup_of_others(name: str) -> None:
    page, plain = html.render(report_with(name)), html.render(report_with("plain"))
    assert is_text(page, most=10**6) and page.encode()
    for mark in ("<script", 'onmouseover="', "<"):
        assert page.count(mark) == plain.count(mark)


@NAMES
def test_a_failing_test_of_the_plugin_is_text(name: str) -> None:
    assert all(is_text(describe_result(result), 1, 20_000) for result in printable_all(report_with(name)).results)


@NAMES
def test_json_keeps_what_was_found(name: str) -> None:
    found = json.loads(json.dumps(report_with(name).as_json()))
    assert found["candidate"] == name and found["results"][0]["where"] == name


@NAMES
def test_the_kill_matrix_is_text(name: str) -> None:
    entry: dict[str, Any] = {"number": "1", "what": name, "killed_by": name, "found": name, "killed": False}
    entry |= {"survived_in": [name], "expected_check": name, "expected_tap": name}
    assert is_text(" ".join(matrix._remark(printable_all(entry))), most=20_000)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.slow
def test_a_browser_runs_nothing_of_a_hostile_name(tmp_path: Path) -> None:
    name = HOSTILE["script"] + "<img src=x onerror=\"document.title='owned'\">" + HOSTILE["attribute"]
    page = tmp_path / "report.html"
    page.write_text(html.render(report_with(name)), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    line = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(line, capture_output=True, text=True, timeout=120).stdout
    assert "3 of 3 shown" in dom  # the page's own script has run
    assert "<title>owned" not in dom and "<title>parity: fail" in dom
