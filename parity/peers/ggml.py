"""ggml as it is on every machine: for llama.cpp's wrapper, and for whoever compares with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_repacking(module: Any) -> Iterator[None]:
    """ggml's plain kernels, the same on every machine: those on AMX tiles crash in some virtual machines."""
    default = module.llama_model_default_params

    def plain() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    module.llama_model_default_params = plain
    try:
        yield
    finally:
        module.llama_model_default_params = default
