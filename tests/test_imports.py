"""The design's import rules, read from the source: who may import whom, imports inside functions included.

`reference` shares no code with what it judges, `parity` judges nanollama without importing it, and model.py and
sample.py stay files that work when copied alone.
"""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = ("nanollama", "reference", "parity", "finetune", "benchmarks", "tests")

# What of ours a module may import; the longest name that fits the module counts.
ALLOWED = {
    "nanollama": ("nanollama",),
    "nanollama.model": (),
    "nanollama.generation.sample": (),
    "nanollama.cli": ("nanollama.__version__", "nanollama.printable", "nanollama.mapped"),
    "nanollama.gate": ("nanollama.gate", "nanollama.printable"),
    "nanollama.printable": (),
    "nanollama.mapped": (),
    "nanollama.machine": (),
    "nanollama.program": ("nanollama.__version__", "nanollama.printable"),
    "nanollama.gguf_header": ("nanollama.gate",),
    "nanollama.vocabulary": ("nanollama.vocabulary", "nanollama.gguf_header", "nanollama.gate"),
    "nanollama.checkpoint": ("nanollama.model", "nanollama.checkpoint", "nanollama.vocabulary")
    + ("nanollama.gguf_header", "nanollama.gate"),
    "finetune": ("nanollama", "finetune"),
    "reference": ("reference", "nanollama.cli", "nanollama.gate", "nanollama.printable"),
    "parity": ("parity", "reference.protocol", "nanollama.cli", "nanollama.gate", "nanollama.printable")
    + ("nanollama.machine", "nanollama.program", "nanollama.__version__"),
    "parity.candidates.nano": ("parity", "nanollama", "finetune"),
    "parity.mutants.edits": ("parity", "nanollama", "finetune"),
    "benchmarks": ("benchmarks", "nanollama", "finetune", "parity"),
    # 1500 reference runs in one process: a process start for each would take longer than the runs.
    "benchmarks.random_shapes": ("benchmarks", "parity", "reference", "nanollama.cli"),
    # The table of mistakes in this process, too: computed once a model, whoever is asked about.
    "benchmarks.held_out": ("benchmarks", "parity", "reference", "nanollama"),
}
# What these import beside it is of the standard library.
PACKAGES = {"nanollama.model": ("torch",), "nanollama.generation.sample": ("torch",), "nanollama.cli": ("fire",)}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the source; `from a import b` gives a.b."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import that the rules forbid to this module."""
    allowed = ALLOWED[max((key for key in ALLOWED if within(module, key)), key=len)]
    found = []
    for line, name in imported(source, module, is_package):
        top = name.partition(".")[0]
        if top in OURS:
            forbidden = not any(within(name, prefix) for prefix in allowed)
        else:
            forbidden = module in PACKAGES and top not in (*PACKAGES[module], *sys.stdlib_module_names)
        if forbidden:
            found.append(f"{module} line {line} imports {name}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for package in OURS[:-1]:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(parts[:-1] if path.name == "__init__.py" else parts), path


def test_every_module_keeps_the_import_rules() -> None:
    found = [
        line
        for module, path in modules()
        for line in breaches(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert found == []


def imports_between(packages: tuple[str, ...]) -> dict[str, set[str]]:
    """Which of these packages' modules imports which, inside functions too."""
    files = {module: path for module, path in modules() if any(within(module, package) for package in packages)}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = [name for _, name in imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")]
        owners = (next((n for n in (name, name.rpartition(".")[0]) if n in files), None) for name in names)
        found[module] = {owner for owner in owners if owner is not None and owner != module}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that stay when those which import none that stays are taken away, again and again: empty without one."""
    left = {module: set(others) for module, others in graph.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        left = {module: others for module, others in left.items() if module not in free}
    return sorted(left)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(imports_between(OURS[:-1])) == []


def test_a_planted_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert circle(graph) == ["a", "b", "c"]


def test_no_file_is_longer_than_400_lines() -> None:
    assert [module for module, path in modules() if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []


def test_the_rules_are_read_from_real_files() -> None:
    names = [module for module, _ in modules()]
    assert {"nanollama", "nanollama.model", "nanollama.generation.sample"} <= set(names)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nanollama.model", "import numpy"),
        ("nanollama.model", "from . import checkpoint"),
        ("nanollama.generation.sample", "from nanollama.model import KVCache"),
        ("nanollama.cli", "def f():\n    import torch"),
        ("nanollama.cli", "from nanollama.gate import kind_of"),
        ("reference.meta", "from nanollama.checkpoint import open_checkpoint"),
        ("nanollama.checkpoint.hf", "def f():\n    from ..tokenizer import open_tokenizer"),
        ("nanollama.checkpoint.hf", "from nanollama import generate"),
        ("nanollama.vocabulary.read", "from nanollama.tokenizer import open_tokenizer"),
        ("nanollama.vocabulary.read", "def f():\n    from nanollama.checkpoint import gguf_types"),
        ("nanollama.gguf_header", "from nanollama.checkpoint.weights import CheckpointError"),
        ("nanollama.generation.llama", "import parity.trace"),
        ("nanollama.generation.llama", "from finetune import lora"),
        ("reference.oracle", "if True:\n    import nanollama.model as m"),
        ("parity.checks.logits", "class A:\n    def f(self):\n        import nanollama"),
        ("parity.checks.logits", "import importlib\nimportlib.import_module('nanollama.model')"),
        ("parity.candidates.nano", "import reference.meta"),
        ("parity.run.runner", "from finetune.train import step"),
        ("parity.candidates.command", "from nanollama.checkpoint import open_checkpoint"),
        ("parity.candidates.module.loading", "def f():\n    from nanollama.model import Transformer"),
        ("finetune.train", "from parity import metrics"),
        ("benchmarks.decode", "import reference.hf"),
    ],
)
def test_a_planted_breach_is_found(module: str, source: str) -> None:
    assert len(breaches(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nanollama.model", "import math, torch\nfrom torch import nn\nfrom dataclasses import dataclass"),
        ("nanollama.checkpoint.hf", "from ..model import ModelConfig\nfrom .names import meta_name\nimport numpy"),
        (
            "nanollama.generation.llama",
            "from nanollama.checkpoint import open_checkpoint\nfrom .sample import make_sampler",
        ),
        ("parity.candidates.nano", "def load():\n    from nanollama.model import Transformer"),
        ("benchmarks.decode", "import nanollama.generation.llama, parity.measure.metrics"),
        ("reference.hf", "from reference.files import read\nimport transformers"),
    ],
)
def test_an_allowed_import_is_not_a_breach(module: str, source: str) -> None:
    assert breaches(source, module) == []


MODEL_ALONE = """
import torch
from model import KVCache, ModelConfig, Transformer

config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=11, hidden_dim=48)
model = Transformer(config)
tokens = torch.arange(7)[None]
with torch.no_grad():
    for parameter in model.parameters():
        parameter.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    cache = KVCache(config, 1, 7, dtype=torch.float32, device="cpu")
    parts = torch.cat([model(tokens[:, :4], cache=cache), model(tokens[:, 4:], cache=cache)], dim=1)
assert whole.shape == (1, 7, 11), whole.shape
torch.testing.assert_close(parts, whole)
"""


def test_model_runs_when_copied_alone(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_bytes((REPOSITORY / "nanollama" / "model.py").read_bytes())
    (tmp_path / "run.py").write_text(MODEL_ALONE)
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
