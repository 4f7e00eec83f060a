"""README and the quickstart as a stranger uses them: each command finds the files that those before it made.

The default suite reads each command with the parser that will read it, and follows the files that commands make. The
slow test types them, in an empty folder.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from markdown_commands import BLOCK, PROGRAMS, Shown, Typed, exit_code, module_of, read_page
from parity.report.place import source_of

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / name for name in ("README.md", "docs/quickstart.md") if "```" in (REPOSITORY / name).read_text()]
TARGET = re.compile(r"^([\w-]+)(?::| \?=)", re.MULTILINE)
# Flags that name what a command reads or writes; of the first, words that name no file.
READ = ("ckpt", "src", "data", "prompts", "tokenizer", "kit", "port", "source", "tokens", "a", "b", "teacher", "model")
WRITTEN = ("out", "dst", "html", "json", "svg", "junit")
NO_FILES = ("auto", "sample", "tinystories")


def files_of(values: dict[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        given = values.get(name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and str(value) not in NO_FILES:
                yield str(value)


def candidate_files(values: dict[str, Any]) -> Iterator[str]:
    candidate = str(values.get("candidate") or "")
    if candidate.startswith("hf:"):
        yield candidate.removeprefix("hf:")
    elif ".py:" in candidate:
        yield candidate.removeprefix("torch:").rpartition(":")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_runs(
    page: Path, parsed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    made, typed = set[str](), 0
    for item in read_page(page):
        if isinstance(item, Shown):
            made.add(item.name)
            continue
        typed += 1
        here = f"{page.name}:{item.line}: {item.text}"
        parsed.clear()
        if found := module_of(item.words):
            assert exit_code(*found, monkeypatch) == 0, here
            assert len(parsed) == 1, f"{here}: reads no command line of ours"
            for name in (*files_of(parsed[0], READ), *candidate_files(parsed[0])):
                known = Path(name).parts[0] in made or (REPOSITORY / name).exists()
                assert known or item.needs, f"{here}: nothing before it makes {name}"
            made |= {Path(name).parts[0] for name in files_of(parsed[0], WRITTEN)}
        else:
            check_other(item, here)
    assert typed


def check_other(item: Typed, here: str) -> None:
    """make, pip and what activates an environment."""
    program, *rest = item.words
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    if program == "make":
        known = TARGET.findall((REPOSITORY / "Makefile").read_text(encoding="utf-8"))
        assert rest and all(word.partition("=")[0] in known for word in rest), here
    elif program == "pip":
        extras = re.search(r"\[([\w,]+)\]", item.text)
        assert rest[0] == "install" and extras, here
        assert all(f"\n{extra} = [" in text for extra in extras[1].split(",")), here
    else:
        assert item.words == [".", ".venv/bin/activate"], here


def test_only_what_nobody_has_is_excused() -> None:
    needs = [item.needs for page in PAGES for item in read_page(page) if isinstance(item, Typed) and item.needs]
    assert all(what == "weights" and len(why) > 10 for what, why in needs)
    readme = [item.needs[0] for item in read_page(PAGES[0]) if isinstance(item, Typed) and item.needs]
    assert readme == ["weights"]


def test_every_line_of_the_readmes_blocks_is_a_command() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    lines = [line for found in BLOCK.finditer(text) if not found[3] for line in found[4].splitlines()]
    assert [line for line in lines if line.split()[0] not in PROGRAMS] == []
    assert len(lines) == sum(isinstance(item, Typed) for item in read_page(PAGES[0]))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("python -m parity.check --kandidate x", "exit"),
        ("python -m parity.check --ckpt absent", "nothing before it makes absent"),
        ("make chekc", "make chekc"),
        ("pip install '.[paritee]'", "paritee"),
        ("parity chek", "No module named"),
    ],
)
def test_a_command_that_does_not_run_is_found(
    text: str, why: str, parsed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```\n{text}\n```\n")
    with pytest.raises((AssertionError, ImportError)):
        test_every_command_is_one_that_runs(page, parsed, monkeypatch, tmp_path)


# --- The picture -----------------------------------------------------------------------------------------------------


def test_the_picture_is_what_its_command_makes(parsed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    [line] = re.findall(r"<!-- made by: (.+) -->", text)
    found = module_of(line.split())
    assert found is not None and exit_code(*found, monkeypatch) == 0
    assert str(parsed[0]["svg"]) == picture
    file, candidate = REPOSITORY / picture, parsed[0]["candidate"]
    assert file.stat().st_size < 150_000
    drawn = file.read_text(encoding="utf-8")
    assert "FAIL" in drawn and candidate in drawn and "first departs at layers.0.q_rope" in drawn
    monkeypatch.chdir(REPOSITORY)
    assert source_of(candidate) is not None


# --- Typed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_as_printed(page: Path, tmp_path: Path) -> None:
    """In an empty folder, on seeded weights; training is cut to its first steps. What ends in & runs to the end."""
    place = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    type_all(read_page(page), tmp_path, os.environ | place, cut=True)


@pytest.mark.network
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_as_printed_in_an_empty_environment(page: Path, tmp_path: Path) -> None:
    """In a fresh clone, and a Python environment with nothing but what the page installs; nothing is cut."""
    clone, fresh, empty = (tmp_path / name for name in ("clone", "fresh", "empty"))
    empty.mkdir()
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", fresh], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env["PATH"] = f"{fresh / 'bin'}:{os.environ['PATH']}"
    [install] = re.findall(r"pip install '\.\[[\w,]+\]'", page.read_text(encoding="utf-8"))
    subprocess.run(shlex.split(install), cwd=clone, env=env, check=True)
    page_items = list(read_page(page))
    checkout = {item.line for item in page_items if isinstance(item, Typed) and item.words[0] == "make"}
    block = [item.text for item in page_items if isinstance(item, Typed) and item.line in checkout]
    subprocess.run(["bash", "-e", "-c", "\n".join(block)], cwd=clone, env=env, check=True)
    type_all((i for i in page_items if isinstance(i, Shown) or i.line not in checkout), empty, env, cut=False)


def type_all(page: Iterable[Typed | Shown], folder: Path, env: Mapping[str, str], cut: bool) -> None:
    """cut: training stops after its first steps."""
    with ExitStack() as stack:
        for item in page:
            if isinstance(item, Shown):
                (folder / item.name).write_text(item.text, encoding="utf-8")
            elif item.needs is None and module_of(item.words):
                short = ["--max_steps", "20"] if cut and "finetune." in item.text else []
                process = subprocess.Popen([*item.words, *short], cwd=folder, env=env)
                if item.stays:
                    stack.callback(process.wait)
                    stack.callback(process.terminate)
                    continue
                # A run cut to its first steps may end worse than it began, and says so by its exit code.
                assert process.wait() == 0 or (short and process.returncode == 1), item.text
