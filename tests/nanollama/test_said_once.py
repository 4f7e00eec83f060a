"""What is written once: the parser of command lines, the rule of the cache folder, the names of dtypes."""

import ast
import re
from pathlib import Path

import pytest

from nanollama.machine import cache_folder, peak_memory_bytes

REPOSITORY = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
FOLDER_RULE = re.compile(r"environ.*(NANOLLAMA_CACHE|XDG_CACHE_HOME)|user_cache_dir|[\"']\.cache[\"']")


def files_of(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((REPOSITORY / package).rglob("*.py"))]


def names_dtypes(node: ast.AST) -> bool:
    """Whether it is a dict between texts and torch's dtypes."""
    if not isinstance(node, ast.Dict):
        return False
    sides = [node.values, [key for key in node.keys if key is not None]]
    texts = [all(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in side) for side in sides]
    dtypes = ["torch.bfloat16" in map(ast.unparse, side) for side in sides]
    return (texts[0] and dtypes[1]) or (texts[1] and dtypes[0])


def test_one_module_parses_command_lines() -> None:
    found = [
        path
        for path in files_of("nanollama", "parity", "finetune", "reference", "benchmarks")
        if re.search(r"\bargparse\b|from fire import", path.read_text(encoding="utf-8"))
    ]
    assert [str(path.relative_to(REPOSITORY)) for path in found] == ["nanollama/cli.py"]


def test_one_module_says_where_the_cache_folder_is() -> None:
    packages = ("nanollama", "parity", "finetune", "reference", "benchmarks")
    found = [path for path in files_of(*packages) if FOLDER_RULE.search(path.read_text(encoding="utf-8"))]
    assert [str(path.relative_to(REPOSITORY)) for path in found] == ["nanollama/machine.py"]


@pytest.mark.parametrize(
    ("package", "where"),
    [("nanollama", "weights"), ("reference", "weights"), ("parity", "contract"), ("finetune", "config")],
)
def test_a_package_names_its_dtypes_once(package: str, where: str) -> None:
    files = [path for path in files_of(package) if path.parent.name != "peers"]  # wrappers speak their peer's names
    trees = [(path.stem, ast.parse(path.read_text(encoding="utf-8"))) for path in files]
    assert [stem for stem, tree in trees for node in ast.walk(tree) if names_dtypes(node)] == [where]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"NANOLLAMA_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"NANOLLAMA_CACHE": "~/b"}, "/home/me/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/nanollama"),
        ({"NANOLLAMA_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/nanollama"),
    ],
)
@pytest.mark.skipif("sys.platform != 'linux'", reason="other systems have other folders")
def test_the_cache_folder_is_the_users_unless_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("NANOLLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_the_peak_of_memory_does_not_fall() -> None:
    before = peak_memory_bytes()
    assert before is not None and before > 2**20
    assert (peak_memory_bytes() or 0) >= before
