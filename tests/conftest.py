"""Fixtures that every test file shares. The suite is offline: nothing here or in a test may reach the network."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zygote

# Set before any test module imports torch: each of two workers, and each of their processes, has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Set before any test module imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NANOLLAMA_TRACE_BYTES"] = "0"  # what a test sees is run for it

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Tests that take minutes are named when they begin."""
    chosen = config.getoption("markexpr")
    if "slow" in chosen and "not slow" not in chosen:
        config.option.verbose = max(1, config.option.verbose)


@pytest.fixture(autouse=True)
def own_path() -> Iterator[None]:
    """A candidate's folder, put on the path when its file is imported, is not on the path of the next test."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(autouse=True, scope="session")
def warm_processes() -> Iterator[None]:
    """`python -m` a module of ours is forked from a process that has the libraries loaded."""
    if sys.platform != "linux":
        yield
        return
    with zygote.warm():
        yield
    zygote.stop()


@pytest.fixture
def cold_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of this test starts as a user's does."""
    monkeypatch.setattr(subprocess, "Popen", zygote.RealPopen)


@pytest.fixture(autouse=True)
def cold_where_slow(request: pytest.FixtureRequest) -> None:
    """What is slow measures memory and time, too: its processes start as a user's do."""
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("cold_processes")


@pytest.fixture
def kept_traces(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several candidates on one checkpoint, only the first waits for the references and the oracle."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    monkeypatch.setenv("NANOLLAMA_CACHE", str(shared / "kept"))
    monkeypatch.setenv("NANOLLAMA_TRACE_BYTES", str(10**9))


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """`test_data(name)`: a file in $NANOLLAMA_TEST_DATA or ../shared/data; skips the test where it is missing."""
    folder = Path(os.environ.get("NANOLLAMA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"test data {name} not found; set NANOLLAMA_TEST_DATA to the folder that holds it")
        return path

    return find


@pytest.fixture(scope="session")
def llama3_tokenizer_path() -> Path:
    """The Llama 3 tokenizer that ships inside Meta's `llama_models` package (found without importing the package)."""
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """While it lasts, a command of ours reads its line and does nothing; what it read is here."""
    from nanollama import cli

    found: list[dict[str, Any]] = []

    def only_read(command: cli.Command, args: list[str]) -> int:
        found.append(cli.parse(args, command.parameters()))
        return 0

    monkeypatch.setattr(cli.Command, "run", only_read)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a command's own, for the process that it would be
    return found
