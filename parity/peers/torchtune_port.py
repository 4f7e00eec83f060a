"""torchtune's llama3_1, filled by its own converter of Hugging Face weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_1 import llama3_1


class Port:
    max_positions = 1024

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    folder = Path(checkpoint)
    c = json.loads((folder / "config.json").read_text())
    heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
    model = llama3_1(
        vocab_size=c["vocab_size"], num_layers=c["num_hidden_layers"], num_heads=heads, num_kv_heads=kv_heads,
        embed_dim=dim, max_seq_len=Port.max_positions, intermediate_dim=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"], rope_base=c["rope_theta"], scale_factor=c["rope_scaling"]["factor"],
    )  # fmt: skip
    weights = hf_to_tune(load_file(folder / "model.safetensors"), heads, kv_heads, dim)
    model.load_state_dict(weights, strict=True)
    return Port(model.to(device=device, dtype=dtype).eval())
