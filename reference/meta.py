"""Meta's own Llama code (`llama_models`, over fairscale) as a reference.

Whole: Meta's Transformer on memory-mapped weights, hooks on its modules. Streamed: Meta's TransformerBlock, one layer
at a time; what its forward hands to the blocks (mask, RoPE table) is taken from its own forward on a model without
layers. Meta's code hard-codes RoPE scaling by 8; where the checkpoint says otherwise the function is replaced while
the table is made, and the trace says so under `errata`.

    python -m reference.meta --ckpt Meta-Llama-3.1-8B --prompt "Simply put, the theory of relativity states that"
"""

import contextlib
import io
import math
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel import layers as fs_layers
from llama_models.llama3 import model as meta_model
from llama_models.llama3.args import ModelArgs
from torch import Tensor, nn

from reference.command import engine_main, run_command
from reference.driver import Text, use_copies
from reference.files import Checkpoint, Config, read_json
from reference.files.weights import Unusable
from reference.hooks import Capture, Recorder, Rows, Stream, hook, hook_block, replaced
from reference.training import Trainable, unfrozen

META_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}

MODULES = {  # tap of a block -> the module that computes it
    "attn_norm": "attention_norm",
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "attn_out": "attention.wo",
    "ffn_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "ffn_out": "feed_forward.w2",
    "out": "",
}


def scaled_frequencies(freqs: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1 scaling with any numbers: long wavelengths are slowed by `factor`, those between the bounds in part."""
    low, high, context = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["original_context"]
    wavelength = 2 * math.pi / freqs
    share = ((context / wavelength - low) / (high - low)).clamp(0, 1)  # 1: left as it is, 0: slowed entirely
    between = (1 - share) * freqs / scaling["factor"] + share * freqs
    slowed = torch.where(wavelength > context / low, freqs / scaling["factor"], between)
    return torch.where(wavelength < context / high, freqs, slowed)


def rope_table(config: Config, end: int) -> Tensor:
    """Meta's complex table (end, head_dim/2), by Meta's code with the checkpoint's scaling."""
    scaling = config["rope_scaling"]
    patch: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if scaling is not None and scaling != META_SCALING:
        patch = replaced(meta_model, "apply_scaling", partial(scaled_frequencies, scaling=scaling))
    with patch:
        return meta_model.precompute_freqs_cis(config["head_dim"], end, config["rope_theta"], scaling is not None)


def model_args(checkpoint: Checkpoint, max_tokens: int, **changed: int) -> ModelArgs:
    """Meta's configuration: its own params.json as it stands; for other formats one with the same numbers.

    Llama 2's params.json leaves vocab_size and rope_theta to its code. Other formats give the feed-forward width,
    which Meta's code knows only as a multiple of 2/3 of 4 dim.
    """
    config = checkpoint.config
    if config["head_dim"] * config["n_heads"] != config["dim"]:
        raise Unusable(
            f"head_dim {config['head_dim']} x {config['n_heads']} heads is not dim {config['dim']}: "
            "Meta's code cannot run this checkpoint; use the other reference alone"
        )
    if checkpoint.format == "meta":
        given = read_json(checkpoint.folder / "params.json")
    else:
        given = {name: config[name] for name in ("dim", "n_layers", "n_heads", "norm_eps")}
        width = (config["hidden_dim"] + 0.5) / int(2 * (4 * config["dim"]) / 3)
        given |= {"multiple_of": 1, "ffn_dim_multiplier": width, "use_scaled_rope": config["rope_scaling"] is not None}
    given |= {name: config[name] for name in ("n_kv_heads", "vocab_size", "rope_theta")}
    return ModelArgs(**given | {"max_batch_size": 1, "max_seq_len": max_tokens} | changed)


def start_model_parallel() -> None:
    """fairscale wants a process group: one of a single process, with its store in memory and bound to loopback."""
    if fs_init.model_parallel_is_initialized():
        return
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints; stdout carries the progress lines
        fs_init.initialize_model_parallel(1)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Build Meta's modules on the meta device. fairscale allocates with torch.Tensor(...), which no device governs.

    The RoPE table is left out: it is computed on a real device afterwards (on the meta device, that imports torch's
    compiler for seconds).
    """

    def parameter(data: Tensor) -> nn.Parameter:
        return nn.Parameter(data.to("meta"), requires_grad=False)

    no_table = replaced(meta_model, "precompute_freqs_cis", lambda *_: None)
    with torch.device("meta"), replaced(fs_layers, "Parameter", parameter), no_table:
        yield


class MetaModel:
    """Meta's whole Transformer."""

    def __init__(self, engine: "MetaEngine", dtype: torch.dtype, max_tokens: int):
        self.engine, self.dtype = engine, dtype
        checkpoint = engine.checkpoint
        with without_memory():
            self.model = meta_model.Transformer(model_args(checkpoint, max_tokens))
        state = {name: engine.load(name, dtype) for name in checkpoint.weights}
        state.setdefault("output.weight", state["tok_embeddings.weight"])  # tied
        self.model.load_state_dict(state, strict=True, assign=True)
        self.model.freqs_cis = rope_table(checkpoint.config, max_tokens).to(engine.device)
        hook(self.model.tok_embeddings, "", "embed", engine.recorder)
        hook(self.model.norm, "", "final_norm", engine.recorder)
        for i, block in enumerate(self.model.layers):
            hook_block(block, i, engine.recorder, MODULES)

    def logits(self, tokens: Tensor) -> Tensor:
        self._empty_caches(tokens.shape[1])
        return self.model(tokens, 0)

    def greedy(self, prompt: list[int], max_new_tokens: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
        """Prefill, then one token at a time through Meta's cache."""
        self._empty_caches(len(prompt) + max_new_tokens)
        answer: list[int] = []
        tokens, position = prompt, 0
        while len(answer) < max_new_tokens:
            logits = self.model(torch.tensor([tokens], device=self.engine.device), position)
            position += len(tokens)
            tokens = [int(logits[0, -1].argmax())]
            if tokens[0] in stop_ids:
                break
            answer += tokens
        return answer

    def _empty_caches(self, max_tokens: int, rows: int = 1) -> None:
        if max_tokens > len(self.model.freqs_cis):
            self.model.freqs_cis = rope_table(self.engine.checkpoint.config, max_tokens).to(self.engine.device)
        for block in self.model.layers:
            config, device = self.engine.checkpoint.config, self.engine.device
            empty_cache_(block.attention, config, max_tokens, self.dtype, device, rows)


class MetaLayers:
    """Meta's blocks, one at a time."""

    def __init__(self, engine: "MetaEngine", dtype: torch.dtype, max_tokens: int):
        self.engine, self.dtype, self.max_tokens = engine, dtype, max_tokens
        self.args = model_args(engine.checkpoint, max_tokens)
        shell_args = model_args(engine.checkpoint, max_tokens, n_layers=0)
        with without_memory():
            self.shell = meta_model.Transformer(shell_args)
        self.capture = Capture()
        self.shell.tok_embeddings = Rows(partial(engine.embed, dtype=dtype))
        self.shell.layers = nn.ModuleList([self.capture])
        self.shell.norm = self.shell.output = nn.Identity()
        self.shell.freqs_cis = rope_table(engine.checkpoint.config, max_tokens).to(engine.device)

    def begin(self, tokens: Tensor) -> Stream:
        self.shell(tokens, 0)
        return self.capture.seen

    def block(self, layer: int) -> Callable[..., Tensor]:
        with without_memory():
            block = meta_model.TransformerBlock(layer, self.args)
        config, prefix = self.engine.checkpoint.config, f"layers.{layer}."
        state = {name: self.engine.load(prefix + name, self.dtype) for name in block.state_dict()}
        block.load_state_dict(state, strict=True, assign=True)
        hook_block(block, layer, self.engine.recorder, MODULES)

        def run(hidden: Tensor, *args: Any) -> Tensor:
            empty_cache_(block.attention, config, hidden.shape[1], self.dtype, self.engine.device)
            return block(hidden, *args)

        return run

    def norm(self) -> Callable[[Tensor], Tensor]:
        norm = meta_model.RMSNorm(self.args.dim, eps=self.args.norm_eps)
        norm.load_state_dict({"weight": self.engine.load("norm.weight", self.dtype)}, assign=True)
        return norm


class MetaEngine:
    """Meta's code as the driver sees it."""

    name = "meta"
    packages: tuple[str, ...] = ("llama_models", "fairscale")

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu"):
        self.checkpoint, self.device = checkpoint, device
        self.recorder = Recorder()
        scaling = checkpoint.config["rope_scaling"]
        changed = scaling is not None and scaling != META_SCALING
        self.errata: tuple[str, ...] = (
            (f"Meta's code hard-codes RoPE scaling {META_SCALING}; run with {scaling}",) if changed else ()
        )
        model_args(checkpoint, 1)  # refuses what Meta's code cannot run
        start_model_parallel()

    def config(self) -> Config:
        """What Meta's code was given, and the two facts that it has no place for."""
        args = model_args(self.checkpoint, 1)
        own = {name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")}
        own |= {"norm_eps": args.norm_eps, "rope_theta": args.rope_theta, "head_dim": args.dim // args.n_heads}
        return {**self.checkpoint.config, **own}

    def logits_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def rope(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        table = rope_table(self.checkpoint.config, max(positions, default=0) + 1)[positions]
        return table.real, table.imag

    def text(self, tokenizer: str | None) -> Text:
        from reference.meta_text import open_text

        return open_text(self.checkpoint, tokenizer)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record the rotated q and k: they leave no module, so the function is wrapped."""
        rotate, recorder = meta_model.apply_rotary_emb, self.recorder

        def recorded(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
            xq, xk = rotate(xq, xk, freqs_cis=freqs_cis)
            recorder(f"layers.{recorder.layer}.q_rope", xq)
            recorder(f"layers.{recorder.layer}.k_rope", xk)
            return xq, xk

        with replaced(meta_model, "apply_rotary_emb", recorded):
            yield

    def whole(self, dtype: torch.dtype, max_tokens: int) -> MetaModel:
        return MetaModel(self, dtype, max_tokens)

    def layers(self, dtype: torch.dtype, max_tokens: int) -> MetaLayers:
        return MetaLayers(self, dtype, max_tokens)

    def trainable(self, max_tokens: int) -> Trainable:
        """Meta's plain forward, without its inference mode; its caches keep the graph, so each pass gets fresh ones."""
        whole = self.whole(torch.float32, max_tokens)
        if self.checkpoint.config["tied"]:
            whole.model.output.weight = whole.model.tok_embeddings.weight
        forward = meta_model.Transformer.forward.__wrapped__

        def logits(tokens: Tensor) -> Tensor:
            whole._empty_caches(tokens.shape[1], rows=tokens.shape[0])
            return forward(whole.model, tokens, 0)

        return Trainable(logits, unfrozen(whole.model.named_parameters()), lambda name, gradient: gradient)

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        copy = use_copies(self.checkpoint, dtype)
        return self.checkpoint.weights.load(name, dtype, copy=copy).to(self.device)

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.checkpoint.weights.embed(tokens.cpu(), dtype).to(self.device)


def empty_cache_(
    attention: nn.Module, config: Config, max_tokens: int, dtype: torch.dtype, device: str, rows: int = 1
) -> None:
    """Meta's caches are plain attributes; each sequence starts with fresh ones."""
    shape = (rows, max_tokens, config["n_kv_heads"], config["head_dim"])
    attention.cache_k = torch.zeros(shape, dtype=dtype, device=device)
    attention.cache_v = torch.zeros(shape, dtype=dtype, device=device)


def main(arguments: list[str]) -> None:
    engine_main("reference.meta", "What Meta's own code computes.", MetaEngine, arguments)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
