"""The compiled step on the disk: blocks compiled ahead of time by torch's AOTInductor, kept in the cache folder.

A package serves every checkpoint of its shape, dtype and number of threads on this processor.

    from nanollama.speed.package import compile_step
    step = compile_step(model, rows=1)           # the first time 10 to 60 s; after that a tenth of a second
    logits = step(ids, positions, cache)         # (B,), (B,) -> (B, V) float32

Nothing here changes the model, and no setting of inductor's is changed beyond the call that compiles.
"""

import hashlib
import inspect
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanollama.machine import cache_folder
from nanollama.model import Transformer, apply_rope
from nanollama.speed import compiled, kernels
from nanollama.speed.compiled import (
    SLOTS,
    BlockArguments,
    BlockStep,
    CompiledStep,
    CompileError,
    HeadStep,
    Loaded,
    head_weights,
    layer_weights,
)
from nanollama.speed.quantize import weight_bytes

ROWS = (1, 2, 4, 8)  # batch sizes that are compiled; others are filled up to the next
COMPILATION_S = 30.0  # what `worth_compiling` counts with
OPTIONS: dict[str, Any] = {
    # A product and its sum as one instruction, as in the libraries' own matrix products.
    "cpp.enable_floating_point_contract_flag": "fast",
    # What several products read is computed once and stored, not anew in the inner loop of each.
    "realize_reads_threshold": 0,
}


@dataclass(frozen=True)
class Source:
    """A module to compile, example arguments, and which of their dimensions are free."""

    module: nn.Module
    example: list[Tensor]
    dynamic: Any = None

    def path(self) -> Path:
        """The file that holds it compiled: its name covers all that the code depends on."""
        code = "".join(inspect.getsource(part) for part in (kernels, compiled, apply_rope))
        shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in self.example]
        machine = (platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_name())
        settings = (torch.__version__, torch.get_num_threads(), sorted(OPTIONS.items()), machine)
        config = getattr(self.module, "config", None)
        key = hashlib.sha256((code + repr((config, shapes, settings))).encode()).hexdigest()
        return cache_folder() / "compiled" / f"{type(self.module).__name__}-{key[:24]}.pt2"


def compile_step(model: Transformer, rows: int = 1, *, say: Callable[[str], None] | None = None) -> CompiledStep:
    """The step for up to `rows` rows, from disk where this shape was compiled before.

    say: gets a line before a compilation and one after it. Raises CompileError where there is no way to compile.
    """
    if rows > ROWS[-1]:
        raise CompileError(f"{rows} rows decode together: compiled are up to {ROWS[-1]}, use --compile off")
    rows = next(size for size in ROWS if size >= rows)
    for layer in model.layers:
        layer_weights(layer)  # what cannot be compiled is refused before the compiler has run for a minute
    sources = sources_of(model, rows)
    missing, start = not all(source.path().exists() for source in sources), time.perf_counter()
    if missing and say:
        say(f"compiling the decode step for {rows} row(s) of this shape, once: 10 to 60 s ...")
    block, head = (_open(source) for source in sources)
    if missing and say:
        say(f"compiled in {time.perf_counter() - start:.0f} s; kept in {sources[0].path().parent}")
    return CompiledStep(model, rows, block, head)


def is_compiled(model: Transformer, rows: int = 1) -> bool:
    """Whether `compile_step` would find all that it needs on disk."""
    rows = next((size for size in ROWS if size >= rows), 0)
    return bool(rows) and all(source.path().exists() for source in sources_of(model, rows))


def worth_compiling(model: Transformer, rows: int, tokens: int) -> bool:
    """Whether `tokens` steps will win back the time of the compilation; True at once where it is on disk."""
    if rows > ROWS[-1] or model.tok_embeddings.weight.device.type != "cpu":
        return False
    if is_compiled(model, rows):
        return True
    # Eager reads weights at about half of the memory's speed and spends half a millisecond a layer on small operations.
    saved_s = tokens * (weight_bytes(model) / 30e9 + 5e-4 * model.config.n_layers)
    return saved_s > COMPILATION_S


def sources_of(model: Transformer, rows: int) -> tuple[Source, Source]:
    """The block and the head for so many rows."""
    config = model.config
    x = torch.zeros(rows, config.dim, dtype=model.tok_embeddings.weight.dtype)
    rope = torch.zeros(rows, config.head_dim // 2)
    cache = torch.zeros(SLOTS, config.n_kv_heads, config.head_dim, dtype=x.dtype)
    keys, values = ([cache.clone() for _ in range(rows)] for _ in range(2))
    positions = torch.zeros(rows, dtype=torch.int64)
    example = BlockArguments(x, positions, rope, rope.clone(), keys, values, *layer_weights(model.layers[0])).flatten()
    slots = {0: torch.export.Dim("slots", min=2, max=2**24)}
    caches = range(4, 4 + 2 * rows)
    dynamic = (tuple(slots if i in caches else None for i in range(len(example))),)
    return Source(BlockStep(config, rows), example, dynamic), Source(HeadStep(config), [x, *head_weights(model)])


def _cpu_name() -> str:
    """The code is compiled for this very processor, so another one must not find it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _open(source: Source) -> Loaded:
    try:
        path = source.path()
        if not path.exists():
            _compile(source, path)
        return torch._inductor.aoti_load_package(str(path)).loader.run
    except Exception as error:  # whatever a compiler can meet: no g++, a full disk, a torch without inductor
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CompileError(f"the decode step cannot be compiled here ({reason[:200]}): use --compile off") from error


def _compile(source: Source, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        # Neither the caller's inference mode nor his opinion of inductor's deprecation warnings.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Only shapes count: memory that nobody writes is never handed out.
            example = tuple(torch.empty_like(tensor) for tensor in source.example)
            exported = torch.export.export(source.module, example, dynamic_shapes=source.dynamic)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(unfinished), inductor_configs=dict(OPTIONS)
            )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
