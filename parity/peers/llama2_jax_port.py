"""ayaka14732/llama-2-jax, its model and its converter, on a Hugging Face folder. On the path: its clone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

jax.tree_map = jax.tree.map  # of which jax knows the second name only, since then
from lib.llama import ModelConfig, forward_llama, make_rotary_values  # noqa: E402
from lib.llama_params.convert_params import convert_llama  # noqa: E402

STEP = 320  # lengths are padded to its multiples: each shape is compiled


class Port:
    dtypes = ("fp32",)

    def __init__(self, params: Any, config: Any) -> None:
        self.params, self.settings = params, config

    def __call__(self, tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        padded = -(-length // STEP) * STEP
        ids = np.zeros((rows, padded), dtype=np.uint16)
        ids[:, :length] = tokens.numpy()
        mask = jnp.tril(jnp.ones((padded, padded), dtype=bool))[None, None, None]
        rotary = make_rotary_values(None, rows, padded, model_config=self.settings)
        options = {"rotary_values": rotary, "model_config": self.settings}
        logits, _ = forward_llama(self.params, jnp.asarray(ids), mask, **options)
        return torch.from_numpy(np.array(logits)[:, :length])


def load(checkpoint: str, dtype: torch.dtype, device: str) -> Port:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    c = model.config
    width = c.hidden_size // c.num_attention_heads
    config = ModelConfig(
        d_ff=c.intermediate_size, d_k=width, d_v=width, d_model=c.hidden_size, n_heads_kv=c.num_key_value_heads,
        n_rep_kv=c.num_attention_heads // c.num_key_value_heads, n_layers=c.num_hidden_layers,
        rms_norm_eps=c.rms_norm_eps, vocab_size=c.vocab_size, token_id_bos=1, token_id_eos=2, token_id_pad=0,
        dropout_rate=None, return_kv_cache=False,
    )  # fmt: skip
    return Port(convert_llama(model, model_config=config), config)
