"""The pages of docs/: links and anchors lead somewhere, commands have the flags that they are shown with, code runs."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from markdown_commands import commands_of, exit_code, module_of
from parity.checks import CHECKS

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
# LOG.md tells what was typed once, by the flags that there were; CHANGELOG.md the same of the past.
OF_TODAY = [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


# --- Links -----------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """The page without its blocks and pieces of code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if "://" in target:
            continue
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_two_headings_of_a_page_have_one_anchor(page: Path) -> None:
    heads = re.findall(r"^##? (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    assert [head for head in set(heads) if heads.count(head) > 1] == []


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(
        r"`((?:nanollama|reference|parity|finetune|benchmarks|tests|docs)/[\w./-]+\.\w+)`", page.read_text()
    )
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("# A b: c\n[a](#a-b-c)", []),
        ("[a](gone.md)", ["gone.md"]),
        ("# A\n[a](#b)", ["#b"]),
        ("```\n[a](gone.md)\n```\n`[a](gone.md)`", []),
    ],
)
def test_a_broken_link_is_found(text: str, broken: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text + "\n")
    assert broken_links(page) == broken


def test_the_page_of_gates_has_every_check_in_the_order_of_diagnosis() -> None:
    page = (DOCS / "gates.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(CHECKS)


# --- Commands --------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, its words) of every line of a block, and of all code in prose with a flag, that runs one of ours."""
    text = page.read_text(encoding="utf-8")
    typed = [line for block in FENCE.finditer(text) for line in commands_of(block["body"])]
    prose_code = re.findall(r"`([^`\n]+ --[^`\n]+)`", FENCE.sub("", text))
    typed += [re.sub(r" N\b", " 1", code) for code in prose_code]
    yield from filter(None, (module_of(split(line)) for line in typed))


def split(line: str) -> list[str]:
    """The words of a command, without its comment, what it is piped to and what stands for more of it."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe of prose
        return []
    ends = [i for i, word in enumerate(words) if word in ("|", "||", "&", "&&", ">", "2>", "<")]
    return [word for word in words[: min(ends, default=None)] if word != "..."]


@pytest.mark.parametrize("page", [page for page in OF_TODAY if any(commands(page))], ids=name_of)
def test_every_command_has_the_flags_that_it_is_shown_with(
    page: Path, parsed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = list(commands(page))
    bad = [f"{module} {shlex.join(words)}" for module, words in shown if exit_code(module, words, monkeypatch)]
    assert bad == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("$ python -m parity.check --kandidate x", [True]),
        ("torchrun --nproc_per_node 2 -m finetune.text --data x --no_such_flag", [True]),
        ("parity synth --shape tiny --out x > y", [False]),
        ("NANOLLAMA_CKPT=x pytest", []),
    ],
)
def test_a_flag_that_is_none_is_found(
    line: str, bad: list[bool], parsed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```\n{line}\n```\n")
    assert [bool(exit_code(*command, monkeypatch)) for command in commands(page)] == bad


# --- Code ------------------------------------------------------------------------------------------------------------


def of_site(name: str) -> Any:
    """A module of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tutorial_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    space: dict[str, Any] = {}
    for block in of_site("notebook").BLOCK.finditer(page):
        line = page.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(DOCS / "tutorial.md"), "exec"), space)
    assert "noise floors" in capsys.readouterr().out


def test_the_notebook_is_the_tutorial() -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    assert (DOCS / "tutorial.ipynb").read_text(encoding="utf-8") == of_site("notebook").notebook(page)


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel() -> None:
    client = pytest.importorskip(
        "nbclient", reason="nbclient and ipykernel are of no extra: pip install nbclient ipykernel"
    )
    import nbformat

    book = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    client.NotebookClient(book, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    assert sum(cell.cell_type == "code" for cell in book.cells) > 10
