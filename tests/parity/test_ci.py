"""parity.ci and action.yml: a wrong port fails with its cause at its line, a right one passes; names stay text."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import kit_cases
from parity import ci
from parity.contract import Result, Status
from parity.report import annotations, svg
from parity.report.model import CheckpointEntry, Divergence, Report, Tokens
from parity.report.place import Place, place_of, source_of
from runner import Runner, action

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "a|b%0A\n::error::no `x` <img src=x> @you\r\x1b[2J, 100%"


@pytest.fixture
def port(tmp_path: Path) -> Path:
    """A port's repository: its file, and folders whose names are ours."""
    root = tmp_path / "port"
    for name in ("parity", "reference"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("raise RuntimeError('not yours')\n")
    shutil.copy(REPOSITORY / "tests" / "ports" / "plain_port.py", root / "my_port.py")
    return root


def report_of(*results: Result, first: Divergence | None = None, verdict: str = "fail", name: str = "x") -> Report:
    entry = CheckpointEntry(name, "meta", {"n_layers": 1}, 10)
    return Report(
        verdict=verdict, why=f"{name} said", candidate=name, references=["meta"], checkpoint=entry, environment={},
        results=list(results), first_divergence=first, tokens=Tokens(1, 3, 3, {"fp32": 1.0}),
    )  # fmt: skip


FAILED = Result("logits", "G3", Status.FAIL, "meta", "fp32", metric="rho", value=9.0, bound=2.0, where="position 1")
ROPE = Divergence("layers.0.q_rope", "meta", "fp32", "the RoPE base is 10,000", position=1, sequence=0)


# --- The action, run as a runner runs it -----------------------------------------------------------------------------


def test_the_action_fails_a_wrong_port_at_its_line(port: Path, tmp_path: Path) -> None:
    kit = str(kit_cases.made()[1])
    runner = Runner(port, tmp_path, {"candidate": "my_port.py:wrong_base", "kit": kit})
    done = runner.judge()
    assert done.returncode == 1, done.stderr
    line = next(n for n, text in enumerate((port / "my_port.py").read_text().splitlines(), 1) if "def rotate" in text)
    [told] = [text for text in done.stdout.splitlines() if text.startswith("::error")]
    assert told.startswith(
        f"::error file=my_port.py,line={line},title=parity%3A fail::first departs at layers.0.q_rope"
    )
    assert "RoPE base looks like 10,000, the config says 500,000" in told
    assert runner.outputs["judge"]["verdict"] == "fail"
    out = Path(runner.outputs["judge"]["report"])
    assert sorted(p.name for p in out.iterdir()) == [
        "badge.json", "junit.xml", "parity.sarif", "report.html", "report.json", "report.svg", "summary.md",
    ]  # fmt: skip
    assert (tmp_path / "github_step_summary").read_text() == (out / "summary.md").read_text()


def test_a_right_port_passes_by_a_kit(
    port: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.chdir(port)
    code = ci.main(
        ["--kit", str(kit_cases.made()[1]), "--candidate", "my_port.py:load", "--out", str(tmp_path / "out")]
    )
    assert code == 0 and "::error" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "badge.json").read_text())["message"].startswith("pass")
    assert json.loads((tmp_path / "out" / "parity.sarif").read_text())["runs"][0]["results"] == []


def test_an_input_is_never_run(port: Path, tmp_path: Path) -> None:
    for step in action()["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), "an input written into a script is run as part of it"
    hostile = {"candidate": '$(touch stolen)"; touch stolen; #:load', "flags": "$(touch stolen) `touch stolen`"}
    done = Runner(port, tmp_path, hostile).judge()
    assert done.returncode == 2 and not list(tmp_path.rglob("stolen"))
    assert "::error title=parity%3A unusable::" in done.stdout


def test_every_step_is_one_that_a_runner_takes() -> None:
    runs = action()["runs"]
    assert runs["using"] == "composite"
    for step in runs["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert ("shell" in step) == ("run" in step)
    declared = set(action()["inputs"])
    used = set(re.findall(r"inputs\.([\w-]+)", (REPOSITORY / "action.yml").read_text()))
    assert used == declared


def test_a_port_needs_ten_lines_of_yaml() -> None:
    page = (REPOSITORY / "docs" / "ci.md").read_text(encoding="utf-8")
    text = page.split("```yaml\n")[1].split("```")[0]
    assert len(text.splitlines()) <= 10
    [_, judged] = yaml.safe_load(text)["jobs"]["parity"]["steps"]
    assert set(judged["with"]) <= set(action()["inputs"])
    rows = re.findall(r"^\| `([\w-]+)` \|.*\|.*\|$", page.split("Outputs:")[0], re.MULTILINE)
    assert rows == list(action()["inputs"])


@pytest.mark.slow
def test_the_action_judges_by_the_references(port: Path, tmp_path: Path) -> None:
    done = Runner(port, tmp_path, {"candidate": "my_port.py:dropped_scaling"}).judge()
    assert done.returncode == 1, done.stderr
    assert "::error file=my_port.py,line=" in done.stdout and "scaling" in done.stdout
    assert Runner(port, tmp_path, {"candidate": "my_port.py:load"}).judge().returncode == 0


# --- Where the annotation stands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "tap", "line"),
    [
        ("import torch\n\nclass RMSNorm:\n    pass\n", "layers.0.attn_norm", 3),
        ("int x;\nvoid rope_apply(float *q) {\n", "layers.1.k_rope", 2),
        ("use std;\npub fn rms_norm(x: &[f32]) {}\npub fn mlp() {}\n", "layers.0.ffn_out", 3),
        ("func Attention(q []float32) {\n", "layers.0.attn_mix", 1),
        ("export function swiglu(x) {\n", "layers.0.gate", 1),
        ("x = 1\n", "layers.0.q_rope", 1),
        ("\0ELF rope(", "layers.0.q_rope", 1),
    ],
)
def test_a_tap_is_shown_where_the_file_makes_it(source: str, tap: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text(source)
    assert place_of(report_of(FAILED, first=replace(ROPE, tap=tap)), file).line == line


def test_a_method_and_a_crash_are_shown_at_their_own_lines(tmp_path: Path) -> None:
    file = tmp_path / "my_port.py"
    file.write_text("class Port:\n    def decode(self, tokens):\n        raise ValueError\n")
    cached = replace(FAILED, check="cache")
    assert place_of(report_of(cached), file) == Place(file, 2, "decode")
    crash = Result("logits", "G3", Status.ERROR, reason="model(tokens): ValueError: no kernel (my_port.py:3)")
    assert place_of(report_of(cached, crash), file).line == 3
    (tmp_path / "main.rs").touch()
    panicked = replace(crash, reason=f"the program ended: panicked at {tmp_path}/main.rs:12:5: no kernel")
    assert place_of(report_of(panicked), file) == Place(tmp_path / "main.rs", 12, f"{tmp_path}/main.rs:12")
    elsewhere = replace(crash, reason="http://127.0.0.1:8000 ValueError: no kernel (other.py:3)")
    assert place_of(report_of(elsewhere), file) == Place(file)


def test_the_file_of_a_candidate_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src" / "port").mkdir(parents=True)
    for name in ("a b.py", "port", "src/port/model.py", "src/port/__init__.py"):
        if not Path(name).exists():
            Path(name).touch()
    found = {
        "a b.py:load": "a b.py", "torch:a b.py:Llama": "a b.py", "port.model:load": "src/port/model.py",
        "cmd:./port {ckpt} {dtype}": "port", "limits:1:2:3 cmd:./port {ckpt}": "port",
        "env:venv/bin/python src/port/model.py:load": "src/port/model.py",
        "cmd:cargo run": None, "http://127.0.0.1:8000/v1": None, "nanollama": None, "absent.py:load": None,
    }  # fmt: skip
    for name, file in found.items():
        assert source_of(name) == (Path(file) if file else None), name


# --- What strangers wrote stays text ---------------------------------------------------------------------------------


def test_a_command_ends_where_it_should() -> None:
    line = annotations.command("error", HOSTILE, file="a,b:c%\n.py", line=None)
    assert "\n" not in line and "\r" not in line
    assert line.startswith("::error file=a%2Cb%3Ac%25%0A.py::a|b%250A%0A::error::no")


def test_no_report_can_be_steered() -> None:
    report = report_of(
        replace(FAILED, metric=HOSTILE, reason=HOSTILE), first=replace(ROPE, probable_cause=HOSTILE), name=HOSTILE
    )
    page = annotations.markdown(report)
    assert "<img" not in page and "\x1b" not in page and "@you" not in page and "\n::" not in page
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line.startswith("|")]
    assert len(set(cells)) == 1  # a bar in a name makes no column
    line = annotations.annotation("fail", annotations.headline(report), Place(REPOSITORY / "README.md"), REPOSITORY)
    assert line is not None and line.count("\n") == 0 and "%0A" not in line.replace("%250A", "")
    assert "<img" not in svg.render(report)
    assert "\x1b" not in json.dumps(annotations.sarif(report, None, REPOSITORY), ensure_ascii=False)


# --- Formats ---------------------------------------------------------------------------------------------------------

# What SARIF 2.1.0's schema requires of the objects that we write, and what it allows in them.
REQUIRED = {"log": {"version", "runs"}, "run": {"tool"}, "tool": {"driver"}, "driver": {"name"},
            "invocation": {"executionSuccessful"}, "result": {"message"}, "rule": {"id"}}  # fmt: skip
ALLOWED = {
    "log": {"$schema", "version", "runs"},
    "run": {"tool", "invocations", "results", "columnKind"},
    "tool": {"driver"},
    "driver": {"name", "semanticVersion", "rules"},
    "rule": {"id", "shortDescription"},
    "invocation": {"executionSuccessful", "toolExecutionNotifications"},
    "result": {"ruleId", "level", "message", "locations", "partialFingerprints"},
}


def fits(kind: str, value: dict[str, Any]) -> None:
    assert REQUIRED[kind] <= set(value) <= ALLOWED[kind], (kind, value)


@pytest.mark.parametrize("place", [Place(REPOSITORY / "a b.py", 3), Place(Path("/elsewhere.py")), None], ids=str)
def test_sarif_is_what_its_schema_asks(place: Place | None) -> None:
    log = annotations.sarif(report_of(FAILED, replace(FAILED, check="kl"), FAILED, first=ROPE), place, REPOSITORY)
    fits("log", log)
    [run] = log["runs"]
    fits("run", run)
    fits("driver", run["tool"]["driver"])
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == ["divergence", "logits", "kl"] == [result["ruleId"] for result in run["results"]]
    for rule in run["tool"]["driver"]["rules"]:
        fits("rule", rule)
        assert rule["shortDescription"]["text"]
    for result in run["results"]:
        fits("result", result)
        assert result["level"] in ("none", "note", "warning", "error") and result["message"]["text"]
        inside = place is not None and "elsewhere" not in str(place.file)
        assert ("locations" in result) == inside
        if inside:
            [location] = result["locations"]
            assert location["physicalLocation"] == {
                "artifactLocation": {"uri": "a%20b.py", "uriBaseId": "%SRCROOT%"},
                "region": {"startLine": 3},
            }
    assert len({result["partialFingerprints"]["parity/1"] for result in run["results"]}) == 3
    [invocation] = annotations.unusable_sarif("no such file")["runs"][0]["invocations"]
    fits("invocation", invocation)
    assert invocation["executionSuccessful"] is False


@pytest.mark.parametrize("verdict", ["pass", "quantized", "limited", "fail", "unusable"])
def test_a_badge_is_what_shields_asks(verdict: str) -> None:
    badge = annotations.badge(verdict, ["fp32", "bf16"])
    assert badge["schemaVersion"] == 1 and badge["label"] and verdict in badge["message"]
    assert badge["isError"] == (verdict in ("fail", "unusable"))


# --- The command -----------------------------------------------------------------------------------------------------


def test_unusable_input_is_told_everywhere_and_leaves_no_older_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    file, out = tmp_path / "my_port.py", tmp_path / "out"
    file.touch()
    out.mkdir()
    (out / "report.html").write_text("an earlier PASS")
    code = ci.main(["--candidate", f"{file}:load", "--ckpt", str(tmp_path / "absent%"), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 2 and said.err.startswith("error: --ckpt ") and said.err.count("\n") == 1
    assert (
        said.out.startswith("::error file=my_port.py,line=1,title=parity%3A unusable::--ckpt ")
        and "absent%25" in said.out
    )
    assert sorted(p.name for p in out.iterdir()) == ["badge.json", "parity.sarif", "summary.md"]
    assert "nothing was judged" in (tmp_path / "summary").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "--candidate is missing"),
        (["--port", "out"], "goes with --kit"),
        (["--candidate", "nanollama", "--flags", "--dtyp fp32"], "unknown flag --dtyp; did you mean --dtype?"),
        (["--candidate", "nanollama", "--flags", "'"], '--flags "\'": No closing quotation'),
        (["--candidate", "nanollama", "--flags", "--checks list"], "parity.check --checks list prints them"),
        (["--candidate", "nanollama", "--source", "absent.c"], "--source absent.c: no such file"),
        (["--kit", "absent", "--port", "a", "--candidate", "nanollama"], "give either --port DIR"),
    ],
)
def test_bad_usage_is_one_line(line: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ci.main([*line, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
