"""The decode step of one token a row at the speed of the memory: blocks compiled ahead of time by torch's AOTInductor.

One compiled block serves every layer, its weights are arguments (nothing is repacked or copied, a mapped file stays
mapped), and keys and values are written into the cache in place. A matrix times one row is a multiply-and-sum in fp32
that reads each weight once, as it is stored: fp32, bf16, int8 or int4. Compiled code lives on disk and serves any
checkpoint of the same shape; `cache_folder()` says where.

    from nanollama.speed.compiled import compile_step
    step = compile_step(model, rows=1)           # the first time 10 to 60 s; after that a tenth of a second
    logits = step(ids, positions, cache)         # (B,), (B,) -> (B, V) float32

Nothing here changes the model, and no setting of inductor's is changed beyond the call that compiles.
"""

import hashlib
import inspect
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanollama.model import KVCache, ModelConfig, RMSNorm, Transformer, apply_rope
from nanollama.speed.quantize import QuantLinear, weight_bytes

Step = Callable[[Tensor, Tensor, KVCache], Tensor]  # ids (B,), positions (B,), cache -> logits (B, V) float32
Loaded = Callable[[list[Tensor]], list[Tensor]]
ROWS = (1, 2, 4, 8)  # batch sizes that are compiled; others are filled up to the next
COMPILATION_S = 30.0  # what `worth_compiling` counts with
SLOTS = 64  # the cache is read in multiples of this
LINEARS = (
    *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
# Without AVX-512 the compiler loads bytes by way of memory and converts bf16 slowly; floats it loads at once.
WORDS = torch.backends.cpu.get_cpu_capability() != "AVX512"
OPTIONS: dict[str, Any] = {
    # A product and its sum as one instruction, as in the libraries' own matrix products.
    "cpp.enable_floating_point_contract_flag": "fast",
    # What several products read is computed once and stored, not anew in the inner loop of each.
    "realize_reads_threshold": 0,
}


class CompileError(ValueError):
    """The step cannot be compiled here; the message says why and that `--compile off` works."""


def dot(x: Tensor, numbers: Tensor, scales: Tensor | None = None) -> Tensor:
    """x (K,), in the order of `arranged`, times a matrix in any of its forms (see `quantize`) -> (N,) float32."""
    x = x.float()
    if numbers.dtype == torch.uint8:
        assert scales is not None
        half = numbers.shape[1]
        x = x.view(2 * half, -1)  # (G, K/G)
        low = [x[j] * (numbers[:, j] & 15).float() for j in range(half)]
        high = [x[j + half] * (numbers[:, j] >> 4).float() for j in range(half)]
        # The numbers are stored plus 8: taken off once a group and not once a weight.
        return ((sum(low[1:] + high, low[0]) - 8 * x.sum(0)) * scales.float()).sum(-1)
    weights = of_words(numbers) if in_words(numbers) else [numbers.float()]
    sums = [(part * weight).sum(-1) for part, weight in zip(x.view(len(weights), -1), weights, strict=True)]
    total = sum(sums[1:], sums[0])
    return total if scales is None else total * scales


def in_words(numbers: Tensor) -> bool:
    """Whether two bf16 or four int8 weights are read as one number of 32 bits."""
    size = {torch.bfloat16: 2, torch.int8: 4}.get(numbers.dtype, 0)
    return WORDS and numbers.device.type == "cpu" and size > 0 and numbers.shape[1] % size == 0


def arranged(x: Tensor, numbers: Tensor) -> Tensor:
    """x (K,) in the order of the weights: for words of n every n-th input from the first on, then from the second."""
    n = 4 // numbers.itemsize
    return torch.cat([x[i::n] for i in range(n)]) if in_words(numbers) else x


def of_words(numbers: Tensor) -> list[Tensor]:
    """bf16 or int8 (N, K) -> float32 (N, K/2) twice or (N, K/4) four times: the words' first weights, their second."""
    words = numbers.view(torch.float32).view(torch.int32)
    if numbers.dtype == torch.bfloat16:
        return [(words << 16).view(torch.float32), (words & -(1 << 16)).view(torch.float32)]
    return [*(((words << (24 - 8 * i)) >> 24).float() for i in range(3)), (words >> 24).float()]


def matvec(x: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """x (B, K) times a matrix -> (B, N) in x's dtype.

    Written row by row and in two halves of the outputs: the compiler fuses them into one pass over the weights with
    independent sums, which keeps the adders busy (one running sum alone waits four cycles for each addition). int4 has
    independent sums of its own, and a GPU has sums enough.
    """
    halves = 2 if operands[0].device.type == "cpu" and operands[0].dtype != torch.uint8 else 1
    parts = list(zip(*(tensor.chunk(halves) for tensor in operands), strict=True))
    # Beside integers, a vector of bf16 would take the compiler's slow conversions for both: fp32 is loaded instead.
    plain = len(operands) == 1 and not in_words(operands[0])
    rows = [arranged(row, operands[0]) for row in (x if plain else x.float()).unbind()]
    return torch.stack([torch.cat([dot(row, *part) for part in parts]) for row in rows]).to(x.dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """One query over its row's cache, in fp32: q (H, D); k, v (S, K, D); position (1,) -> (H, D) in q's dtype."""
    query = q.float().unflatten(0, (k.shape[1], -1))  # (K, R, D), R query heads for each key/value head
    scores = (query * k.float().unsqueeze(2)).sum(-1) / math.sqrt(q.shape[-1])  # (S, K, R)
    hidden = torch.arange(k.shape[0], device=k.device) > position  # (S,)
    probs = scores.masked_fill(hidden.view(-1, 1, 1), -math.inf).softmax(0)
    return (probs.unsqueeze(-1) * v.float().unsqueeze(2)).sum(0).flatten(0, 1).type_as(q)


class BlockStep(nn.Module):
    """A `TransformerBlock` for one token of each row, as a function of its weights.

    Arguments: x (B, C), positions (B,), cos and sin (B, D/2), B key caches (S, K, D), B value caches, the two norms'
    weights (C,), the operands of the seven linear layers.
    """

    def __init__(self, config: ModelConfig, rows: int, per_linear: int) -> None:
        super().__init__()
        self.config, self.rows, self.per_linear = config, rows, per_linear

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Tensor:
        B, D, eps = self.rows, self.config.head_dim, self.config.norm_eps
        keys, values, norms, weights = rest[:B], rest[B : 2 * B], rest[2 * B : 2 * B + 2], rest[2 * B + 2 :]
        wq, wk, wv, wo, w1, w2, w3 = (weights[i * self.per_linear : (i + 1) * self.per_linear] for i in range(7))
        h = norm(x, norms[0], eps)
        q, k, v = (matvec(h, w).unflatten(1, (1, -1, D)) for w in (wq, wk, wv))  # (B, 1, heads, D)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, D/2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        mixed = []
        for b in range(B):
            at = positions[b : b + 1]
            keys[b][at], values[b][at] = k[b], v[b]
            mixed.append(attend(q[b, 0], keys[b], values[b], at))
        x = x + matvec(torch.stack(mixed).flatten(1), wo)
        h = norm(x, norms[1], eps)
        return x + matvec(F.silu(matvec(h, w1)) * matvec(h, w3), w2)


class HeadStep(nn.Module):
    """The final norm and the head: x (B, C), the norm's weight, the head's operands -> logits (B, V) in x's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps

    def forward(self, x: Tensor, weight: Tensor, *operands: Tensor) -> Tensor:
        return matvec(norm(x, weight, self.eps), operands)


def operands_of(linear: nn.Module) -> list[Tensor]:
    """What `dot` needs of a linear layer. Raises CompileError for a layer of another kind."""
    if isinstance(linear, QuantLinear):
        return [linear.numbers, linear.scales]
    if type(linear) is nn.Linear:
        return [linear.weight.detach().contiguous()]
    raise CompileError(
        f"a layer is a {type(linear).__name__}, which the compiled step does not know: use --compile off"
    )


class CompiledStep:
    """A `Step` over compiled blocks. Holds views of the model's weights, no copies."""

    def __init__(self, model: Transformer, rows: int, block: Loaded, head: Loaded) -> None:
        self.model, self.rows, self.block, self.head = model, rows, block, head
        self.layers = [layer_arguments(layer) for layer in model.layers]
        self.head_arguments = head_arguments(model)
        self.seen: tuple[Tensor | None, int, int] = (None, 0, 0)  # what the views below are views of
        self.views: list[list[Tensor]] = []

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        alive, end = ids.shape[0], int(positions.max()) + 1
        if end > cache.max_len:
            raise ValueError(f"position {end - 1} does not fit: the cache holds {cache.max_len} positions")
        cache.length = max(cache.length, end)
        if alive < self.rows:  # fill up with the first row: it writes the same numbers to the same place again
            filler = ids.new_zeros(self.rows - alive)
            ids, positions = torch.cat((ids, ids[filler])), torch.cat((positions, positions[filler]))
        x = self.model.tok_embeddings(ids)  # (B, C)
        cos, sin = self.model._rope_rows(max(end, self.model.config.max_seq_len, cache.max_len), ids.device)
        shared = [positions, cos[positions], sin[positions]]
        for views, weights in zip(self._views(cache, alive, end), self.layers, strict=True):
            x = self.block([x, *shared, *views, *weights])[0]
        return self.head([x, *self.head_arguments])[0][:alive].float()

    def _views(self, cache: KVCache, alive: int, end: int) -> list[list[Tensor]]:
        """For each layer the rows' keys, then their values, as far as they are read; made anew only when that moves."""
        slots = min(-(-end // SLOTS) * SLOTS, cache.max_len)
        if not (self.seen[0] is cache.k[0] and self.seen[1:] == (alive, slots)):
            rows = [*range(alive), *[0] * (self.rows - alive)]
            self.views = [
                [buffer[row, :slots] for buffer in (k, v) for row in rows]
                for k, v in zip(cache.k, cache.v, strict=True)
            ]
            self.seen = (cache.k[0], alive, slots)
        return self.views


def layer_arguments(layer: nn.Module) -> list[Tensor]:
    linears = [operand for name in LINEARS for operand in operands_of(layer.get_submodule(name))]
    return [_norm_weight(layer, "attention_norm"), _norm_weight(layer, "ffn_norm"), *linears]


def head_arguments(model: Transformer) -> list[Tensor]:
    head = [model.tok_embeddings.weight.detach()] if model.output is None else operands_of(model.output)
    return [_norm_weight(model, "norm"), *head]


def _norm_weight(parent: nn.Module, name: str) -> Tensor:
    found = parent.get_submodule(name)
    assert isinstance(found, RMSNorm)
    return found.weight.detach()


def compile_step(model: Transformer, rows: int = 1, *, say: Callable[[str], None] | None = None) -> CompiledStep:
    """The step for up to `rows` rows, from disk where this shape was compiled before.

    say: gets a line before a compilation and one after it. Raises CompileError where there is no way to compile.
    """
    if rows > ROWS[-1]:
        raise CompileError(f"{rows} rows decode together: compiled are up to {ROWS[-1]}, use --compile off")
    rows = next(size for size in ROWS if size >= rows)
    for layer in model.layers:
        layer_arguments(layer)  # what cannot be compiled is refused before the compiler has run for a minute
    (block, block_example, dynamic), (head, head_example, _) = sources(model, rows)
    paths = [package_path(block, block_example), package_path(head, head_example)]
    missing, start = sum(not path.exists() for path in paths), time.perf_counter()
    if missing and say:
        say(f"compiling the decode step for {rows} row(s) of this shape, once: 10 to 60 s ...")
    loaded = [
        _open(block, block_example, dynamic, paths[0]),
        _open(head, head_example, None, paths[1]),
    ]
    if missing and say:
        say(f"compiled in {time.perf_counter() - start:.0f} s; kept in {cache_folder()}")
    return CompiledStep(model, rows, *loaded)


def is_compiled(model: Transformer, rows: int = 1) -> bool:
    """Whether `compile_step` would find all that it needs on disk."""
    rows = next((size for size in ROWS if size >= rows), 0)
    return bool(rows) and all(package_path(module, example).exists() for module, example, _ in sources(model, rows))


def sources(model: Transformer, rows: int) -> list[tuple[nn.Module, list[Tensor], Any]]:
    """(module, example arguments, dynamic shapes) of the block and of the head."""
    config, weights = model.config, layer_arguments(model.layers[0])
    x = torch.zeros(rows, config.dim, dtype=model.tok_embeddings.weight.dtype)
    rope = torch.zeros(rows, config.head_dim // 2)
    caches = [torch.zeros(SLOTS, config.n_kv_heads, config.head_dim, dtype=x.dtype) for _ in range(2 * rows)]
    example = [x, torch.zeros(rows, dtype=torch.int64), rope, rope.clone(), *caches, *weights]
    slots = {0: torch.export.Dim("slots", min=2, max=2**24)}
    dynamic = (None, None, None, None, (*[slots] * len(caches), *[None] * len(weights)))
    block = BlockStep(config, rows, (len(weights) - 2) // len(LINEARS))
    return [(block, example, dynamic), (HeadStep(config), [x, *head_arguments(model)], None)]


def worth_compiling(model: Transformer, rows: int, tokens: int) -> bool:
    """Whether `tokens` steps will win back the time of the compilation; True at once where it is on disk."""
    if rows > ROWS[-1] or model.tok_embeddings.weight.device.type != "cpu":
        return False
    if is_compiled(model, rows):
        return True
    # Eager reads weights at about half of the memory's speed and spends half a millisecond a layer on small operations.
    saved_s = tokens * (weight_bytes(model) / 30e9 + 5e-4 * model.config.n_layers)
    return saved_s > COMPILATION_S


def cache_folder() -> Path:
    """compiled/ in $NANOLLAMA_CACHE, else in nanollama/ of the user's cache folder."""
    own = os.environ.get("NANOLLAMA_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanollama")) / "compiled"


def package_path(module: nn.Module, example: list[Tensor]) -> Path:
    """The file that holds this compiled module: its name covers all that the code depends on."""
    parts = (dot, in_words, arranged, of_words, matvec, norm, attend, apply_rope, type(module))
    source = "".join(inspect.getsource(part) for part in parts)
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in example]
    machine = (platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_name())
    settings = (torch.__version__, torch.get_num_threads(), WORDS, sorted(OPTIONS.items()), machine)
    config = getattr(module, "config", None)
    key = hashlib.sha256((source + repr((config, shapes, settings))).encode()).hexdigest()
    return cache_folder() / f"{type(module).__name__}-{key[:24]}.pt2"


def _cpu_name() -> str:
    """The code is compiled for this very processor, so another one must not find it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _open(module: nn.Module, example: list[Tensor], dynamic: Any, path: Path) -> Loaded:
    try:
        if not path.exists():
            _compile(module, example, dynamic, path)
        return torch._inductor.aoti_load_package(str(path)).loader.run
    except Exception as error:  # whatever a compiler can meet: no g++, a full disk, a torch without inductor
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CompileError(f"the decode step cannot be compiled here ({reason[:200]}): use --compile off") from error


def _compile(module: nn.Module, example: list[Tensor], dynamic: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        # Neither the caller's inference mode nor his opinion of inductor's deprecation warnings.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Only shapes count: memory that nobody writes is never handed out.
            exported = torch.export.export(module, tuple(torch.empty_like(t) for t in example), dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(unfinished), inductor_configs=dict(OPTIONS)
            )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
