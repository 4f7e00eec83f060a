"""Fixtures that every test file shares. The suite is offline: nothing here or in a test may reach the network."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
