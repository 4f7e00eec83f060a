"""Hugging Face `transformers` as a reference: LlamaForCausalLM with eager attention.

Whole: its model on memory-mapped weights, hooks on its modules. Streamed: its LlamaDecoderLayer, one at a time; mask
and RoPE values are taken from its own forward on a model without layers. Taps of q and k are put in Meta's order.

    python -m reference.hf --ckpt Meta-Llama-3.1-8B --prompt "Simply put, the theory of relativity states that"
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from nanollama import gate
from reference.command import engine_main
from reference.driver import Text, use_copies
from reference.files import Checkpoint, Config
from reference.files.hf import hf_name, meta_name
from reference.files.weights import Unusable, half_split_rows
from reference.hooks import Capture, Recorder, Rows, Stream, hook, hook_block, replaced
from reference.training import Trainable, unfrozen

MODULES = {  # tap of a block -> the module that computes it
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "ffn_out": "mlp.down_proj",
    "out": "",
}


def llama_config(checkpoint: Checkpoint) -> transformers.LlamaConfig:
    """transformers' own reading of its own format; for Meta's files, a configuration built from theirs."""
    try:
        if checkpoint.format == "hf":
            config = transformers.LlamaConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
        else:
            config = transformers.LlamaConfig(**_config_arguments(checkpoint.config))
    except Exception as error:  # its validation has error types of its own
        raise Unusable(f"{checkpoint.folder}: transformers refuses the config ({gate.reason(error)})") from None
    config._attn_implementation = "eager"
    return config


def _config_arguments(config: Config) -> dict[str, Any]:
    scaling = config["rope_scaling"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if scaling is not None:
        rope |= {name: scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor")}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": scaling["original_context"]}
    return {
        "hidden_size": config["dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"],
        "head_dim": config["head_dim"],
        "intermediate_size": config["hidden_dim"],
        "vocab_size": config["vocab_size"],
        "rms_norm_eps": config["norm_eps"],
        "max_position_embeddings": 131072,
        "rope_parameters": rope,
        "tie_word_embeddings": config["tied"],
    }


def config_echo(config: transformers.LlamaConfig) -> Config:
    """The configuration as transformers understood it."""
    rope, scaling = config.rope_parameters, None
    if rope["rope_type"] == "llama3":
        scaling = {name: float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_context"] = rope["original_max_position_embeddings"]
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling,
        "tied": config.tie_word_embeddings,
    }


def interleaved(value: Tensor) -> Tensor:
    """(..., D) with rotary pairs (j, j + D/2) -> Meta's order, pairs (2j, 2j+1)."""
    return value.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class HfModel:
    """The whole LlamaForCausalLM."""

    def __init__(self, engine: "HfEngine", dtype: torch.dtype):
        self.engine = engine
        with torch.device("meta"):
            self.model = transformers.LlamaForCausalLM(engine.llama_config).eval()
        self.model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(engine.llama_config).to(engine.device)
        state = {hf_name(name): engine.load(name, dtype) for name in engine.checkpoint.weights}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # tied
        self.model.load_state_dict(state, strict=True, assign=True)
        hook(self.model.model.embed_tokens, "", "embed", engine.recorder)
        hook(self.model.model.norm, "", "final_norm", engine.recorder)
        for i, block in enumerate(self.model.model.layers):
            hook_block(block, i, engine.recorder, MODULES, engine.arranged)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def greedy(self, prompt: list[int], max_new_tokens: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
        """Prefill, then one token at a time through transformers' cache."""
        answer: list[int] = []
        tokens, cache = prompt, None
        while len(answer) < max_new_tokens:
            batch = torch.tensor([tokens], device=self.engine.device)
            output = self.model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            tokens = [int(output.logits[0, -1].argmax())]
            if tokens[0] in stop_ids:
                break
            answer += tokens
        return answer


class HfLayers:
    """transformers' decoder layers, one at a time."""

    def __init__(self, engine: "HfEngine", dtype: torch.dtype):
        self.engine, self.dtype, self.config = engine, dtype, engine.llama_config
        shell_config = transformers.LlamaConfig(**engine.llama_config.to_dict() | {"num_hidden_layers": 1})
        shell_config._attn_implementation = "eager"
        with torch.device("meta"):
            self.shell = modeling_llama.LlamaModel(shell_config).eval()
        self.capture = Capture()
        self.shell.rotary_emb = modeling_llama.LlamaRotaryEmbedding(self.config).to(engine.device)
        self.shell.embed_tokens = Rows(partial(engine.embed, dtype=dtype))
        self.shell.layers = nn.ModuleList([self.capture])
        self.shell.norm = nn.Identity()

    def begin(self, tokens: Tensor) -> Stream:
        self.shell(tokens, use_cache=False)
        return self.capture.seen

    def block(self, layer: int) -> Callable[..., Tensor]:
        with torch.device("meta"):
            block = modeling_llama.LlamaDecoderLayer(self.config, layer).eval()
        prefix = f"model.layers.{layer}."
        state = {name: self.engine.load(meta_name(prefix + name), self.dtype) for name in block.state_dict()}
        block.load_state_dict(state, strict=True, assign=True)
        hook_block(block, layer, self.engine.recorder, MODULES, self.engine.arranged)
        return block

    def norm(self) -> Callable[[Tensor], Tensor]:
        norm = modeling_llama.LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self.engine.load("norm.weight", self.dtype)}, assign=True)
        return norm


class HfEngine:
    """transformers as the driver sees it."""

    name = "hf"
    packages: tuple[str, ...] = ("transformers", "tokenizers")
    errata: tuple[str, ...] = ()

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.checkpoint, self.device = checkpoint, device
        self.recorder = Recorder()
        self.llama_config = llama_config(checkpoint)

    def config(self) -> Config:
        return config_echo(self.llama_config)

    def logits_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def rope(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        table = modeling_llama.LlamaRotaryEmbedding(self.llama_config)
        cos, sin = table(torch.zeros(1), torch.tensor([positions], dtype=torch.long))  # (1, T, D), halves alike
        half = self.llama_config.head_dim // 2
        return cos[0, :, :half], sin[0, :, :half]

    def text(self, tokenizer: str | None) -> Text:
        from reference.hf_text import HfText

        return HfText(self.checkpoint, tokenizer)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record the rotated q and k: they leave no module, so the function is wrapped."""
        rotate, recorder = modeling_llama.apply_rotary_pos_emb, self.recorder

        def recorded(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            q, k = rotate(q, k, *args, **kwargs)  # (1, heads, T, D)
            recorder(f"layers.{recorder.layer}.q_rope", interleaved(q.transpose(1, 2)))
            recorder(f"layers.{recorder.layer}.k_rope", interleaved(k.transpose(1, 2)))
            return q, k

        with replaced(modeling_llama, "apply_rotary_pos_emb", recorded):
            yield

    def whole(self, dtype: torch.dtype, max_tokens: int) -> HfModel:
        return HfModel(self, dtype)

    def layers(self, dtype: torch.dtype, max_tokens: int) -> HfLayers:
        return HfLayers(self, dtype)

    def trainable(self, max_tokens: int) -> Trainable:
        model = self.whole(torch.float32, max_tokens).model
        if self.llama_config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        head_dim = self.llama_config.head_dim

        def to_meta(name: str, gradient: Tensor) -> Tensor:
            if not name.endswith(("wq.weight", "wk.weight")):
                return gradient
            return gradient[half_split_rows(gradient.shape[0] // head_dim, head_dim)]

        named = ((meta_name(name) or name, parameter) for name, parameter in model.named_parameters())
        return Trainable(lambda tokens: model(tokens, use_cache=False).logits, unfrozen(named), to_meta)

    def load(self, name: str | None, dtype: torch.dtype) -> Tensor:
        assert name is not None
        copy = use_copies(self.checkpoint, dtype)
        return self.checkpoint.weights.load(name, dtype, layout="hf", copy=copy).to(self.device)

    def arranged(self, tap: str, value: Tensor) -> Tensor:
        """Heads of q and k in Meta's order."""
        return interleaved(value.unflatten(-1, (-1, self.llama_config.head_dim))) if tap in ("q", "k") else value

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.checkpoint.weights.embed(tokens.cpu(), dtype).to(self.device)


def main(arguments: list[str] | None = None) -> int:
    return engine_main("reference.hf", "What transformers' Llama computes.", HfEngine, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
