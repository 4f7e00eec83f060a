"""What is installed under the name llama-parity: console scripts, typed packages, and nobody else's package."""

import sys
from pathlib import Path
from subprocess import run

import pytest

from nanollama import program

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {"nanollama": "generate", "parity": "check", "finetune": "text"}


def settings() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def say(package: str, *words: str, cwd: Path | None = None, path: Path = REPOSITORY) -> tuple[int, str]:
    """(exit code, what it printed) of `python -m PACKAGE WORDS`, from a folder that is not the checkout."""
    place = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin"}
    done = run([sys.executable, "-m", package, *words], capture_output=True, text=True, env=place, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("package", SCRIPTS)
def test_each_script_lists_its_commands_and_refuses_others(package: str, tmp_path: Path) -> None:
    assert settings()["project"]["scripts"][package].startswith(f"{package}.__main__:")
    code, text = say(package, "--help", cwd=tmp_path)
    assert code == 0 and SCRIPTS[package] in text
    code, text = say(package, SCRIPTS[package] + "x", cwd=tmp_path)
    assert code == 2 and f"did you mean {SCRIPTS[package]}?" in text


@pytest.mark.parametrize("package", ["parity", "finetune"])
def test_every_command_of_a_script_is_there(package: str) -> None:
    commands = __import__(f"{package}.__main__", fromlist=["COMMANDS"]).COMMANDS
    for name in commands:
        places = [REPOSITORY / package / f"{name}.py", REPOSITORY / package / name / "__main__.py"]
        assert any(place.exists() for place in places), name
    runnable = {p.stem for p in (REPOSITORY / package).glob("*.py") if '\nif __name__ == "__main__":' in p.read_text()}
    runnable |= {p.parent.name for p in (REPOSITORY / package).glob("*/__main__.py")}
    assert runnable - {"__main__", "candidates", "serve"} <= set(commands)


def test_a_script_runs_the_module_with_its_flags(tmp_path: Path) -> None:
    code, text = say("parity", "synth", "--shap", "tiny", cwd=tmp_path)
    assert (code, text) == (2, "error: unknown flag --shap; did you mean --shape? (see --help)\n")


def test_another_projects_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    foreign = tmp_path / "parity"
    foreign.mkdir()
    (foreign / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["parity", "check"])
    monkeypatch.delitem(sys.modules, "parity", raising=False)
    assert program.run("parity", {"check": ""}) == 2
    assert f"another project's ({foreign})" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "argv", ["parity", "check"])
    assert program.run("parity", {"check": ""}, needs=("no_such_package",)) == 2
    assert "pip install 'llama-parity[parity]'" in capsys.readouterr().err


def test_the_packages_are_typed_and_no_text_names_the_other_project() -> None:
    data = settings()["tool"]["setuptools"]["package-data"]["*"]
    assert "py.typed" in data
    for package in ("nanollama", "reference", "parity", "finetune"):
        assert (REPOSITORY / package / "py.typed").exists()
    texts = [p for p in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")) if p.name != "CHANGELOG.md"]
    texts += [
        p for package in ("nanollama", "reference", "parity", "finetune") for p in (REPOSITORY / package).rglob("*.py")
    ]
    named = [
        p.name for p in texts if "install nanollama" in (text := p.read_text(encoding="utf-8")) or "nanollama[" in text
    ]
    assert named == []
