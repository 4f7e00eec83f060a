"""LitGPT's GPT, filled by its own converter of Hugging Face weights; its cache."""

import json
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file
from torch import Tensor

POSITIONS = 1024
SCALING = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
           "original_max_seq_len": "original_max_position_embeddings"}  # fmt: skip


class Port:
    max_positions = POSITIONS

    def __init__(self, model: Any) -> None:
        self.model, self.position = model, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.model.clear_kv_cache()
        return self.model(tokens)

    def prefill(self, tokens: Tensor) -> Tensor:
        like = self.model.lm_head.weight
        self.model.clear_kv_cache()
        self.model.set_kv_cache(tokens.shape[0], device=like.device, dtype=like.dtype)
        self.position = 0
        return self.decode(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        start, self.position = self.position, self.position + tokens.shape[1]
        return self.model(tokens, torch.arange(start, self.position), input_pos_maxp1=self.position)


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    folder = Path(checkpoint)
    c = json.loads((folder / "config.json").read_text())
    scaling = c.get("rope_scaling")
    config = Config(
        name="Llama", block_size=POSITIONS, vocab_size=c["vocab_size"], padded_vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"], n_embd=c["hidden_size"], bias=False,
        n_query_groups=c["num_key_value_heads"], rotary_percentage=1.0, parallel_residual=False,
        norm_class_name="RMSNorm", norm_eps=c["rms_norm_eps"], mlp_class_name="LLaMAMLP",
        intermediate_size=c["intermediate_size"], rope_base=c["rope_theta"],
        rope_adjustments={name: scaling[theirs] for name, theirs in SCALING.items()} if scaling else None,
    )  # fmt: skip
    weights: dict[str, Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(folder / "model.safetensors"))
    model = GPT(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return Port(model.to(device=device, dtype=dtype).eval())
