"""likejazz/llama3.np, in NumPy, on a Meta folder of Llama 2: its RoPE base is 10,000. On the path: its clone."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.modules.setdefault("tokenizer", types.SimpleNamespace(Tokenizer=None))  # type: ignore[arg-type]
import llama3  # noqa: E402
from config import ModelArgs  # noqa: E402

POSITIONS = 1024
# It reads Hugging Face's names, with rows of q and k in Meta's order.
NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "layers.": "model.layers.", "tok_embeddings": "model.embed_tokens", "output.": "lm_head.",
}  # fmt: skip


class Whole(np.ndarray):
    """States of which h[:, [-1], :] is all of them: its head is given the last position alone."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(slice(None) if isinstance(key, tuple) and key[1] == [-1] else key)


class Port:
    dtypes = ("fp32",)
    max_positions = POSITIONS

    def __init__(self, model: Any) -> None:
        self.model, norm = model, model.norm
        model.norm = lambda h: norm(h).view(Whole)

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.model(tokens.numpy(), 0), dtype=np.float32))


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    folder, weights = Path(checkpoint), {}
    for name, w in torch.load(folder / "consolidated.00.pth", weights_only=True).items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights["model.norm.weight" if name == "norm.weight" else name] = w.float().numpy()
    llama3.load_parameters = lambda path: weights
    params = json.loads((folder / "params.json").read_text())
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps")
    sizes = {name: params[name] for name in names}
    return Port(llama3.Llama("", ModelArgs(max_seq_len=POSITIONS, max_batch_size=4, **sizes)))
