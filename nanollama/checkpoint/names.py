"""THE map between the weight names of Meta, Hugging Face and GGUF files, and the q/k row order that goes with each.

Everything inside this project carries Meta's names and Meta's rows; only this file knows the others. Rotary embedding
turns pairs of features: Meta's, llama2.c's and GGUF's rows of wq and wk keep the two members of a pair side by side
(2i, 2i+1), Hugging Face's keep them half a head apart (i, i + head_dim/2).

    python -c "from nanollama.checkpoint.names import hf_name; print(hf_name('layers.3.feed_forward.w1.weight'))"
    # model.layers.3.mlp.gate_proj.weight
"""

import re

from torch import Tensor

from nanollama.model import ModelConfig

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# (Meta, Hugging Face, GGUF); {i} is the layer.
_TABLE = (
    (EMBEDDING, "model.embed_tokens.weight", "token_embd.weight"),
    ("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    ("layers.{i}.attention.wq.weight", "model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    ("layers.{i}.attention.wk.weight", "model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    ("layers.{i}.attention.wv.weight", "model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    ("layers.{i}.attention.wo.weight", "model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    ("layers.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    ("layers.{i}.feed_forward.w1.weight", "model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    ("layers.{i}.feed_forward.w2.weight", "model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
    ("layers.{i}.feed_forward.w3.weight", "model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    ("norm.weight", "model.norm.weight", "output_norm.weight"),
    (HEAD, "lm_head.weight", "output.weight"),
)
_META_TO_HF = {meta: hf for meta, hf, _ in _TABLE}
_META_TO_GGUF = {meta: gguf for meta, _, gguf in _TABLE}
_HF_TO_META = {hf: meta for meta, hf, _ in _TABLE}
_GGUF_TO_META = {gguf: meta for meta, _, gguf in _TABLE}


def _translate(name: str, table: dict[str, str]) -> str | None:
    layer = re.search(r"\.(0|[1-9]\d{0,5})\.", name)
    if layer is None:
        return table.get(name)
    pattern = name[: layer.start(1)] + "{i}" + name[layer.end(1) :]
    target = table.get(pattern)
    return None if target is None else target.replace("{i}", layer.group(1))


def hf_name(meta: str) -> str:
    """Meta's name -> Hugging Face's. Raises KeyError for a name that no Llama has."""
    return _known(meta, _translate(meta, _META_TO_HF))


def gguf_name(meta: str) -> str:
    """Meta's name -> GGUF's. Raises KeyError for a name that no Llama has."""
    return _known(meta, _translate(meta, _META_TO_GGUF))


def _known(name: str, found: str | None) -> str:
    if found is None:
        raise KeyError(f"{name} is not the name of a Llama weight")
    return found


def meta_from_hf(name: str) -> str | None:
    """Hugging Face's name -> Meta's, None when it is not a Llama weight."""
    return _translate(name, _HF_TO_META)


def meta_from_gguf(name: str) -> str | None:
    """GGUF's name -> Meta's, None when it is not a Llama weight."""
    return _translate(name, _GGUF_TO_META)


def is_rotary(meta: str) -> bool:
    """Whether the rows of this weight depend on the layout of the rotary pairs: wq and wk."""
    return meta.endswith((".attention.wq.weight", ".attention.wk.weight"))


def to_hf_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Meta's wq or wk (heads*head_dim, dim) in Hugging Face's row order."""
    return weight.unflatten(0, (len(weight) // head_dim, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_meta_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's wq or wk (heads*head_dim, dim) in Meta's row order."""
    return weight.unflatten(0, (len(weight) // head_dim, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's weights, keyed by Meta's name without the `layers.{i}.` prefix, in Meta's order."""
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "attention.wq.weight": (q_rows, config.dim),
        "attention.wk.weight": (kv_rows, config.dim),
        "attention.wv.weight": (kv_rows, config.dim),
        "attention.wo.weight": (config.dim, q_rows),
        "feed_forward.w1.weight": (config.hidden_dim, config.dim),
        "feed_forward.w2.weight": (config.dim, config.hidden_dim),
        "feed_forward.w3.weight": (config.hidden_dim, config.dim),
        "attention_norm.weight": (config.dim,),
        "ffn_norm.weight": (config.dim,),
    }


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model and its shape, in Meta's order; a tied model has no output.weight."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.dim)}
    per_layer = layer_shapes(config)
    for i in range(config.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in per_layer.items()}
    shapes["norm.weight"] = (config.dim,)
    if not config.tied:
        shapes[HEAD] = (config.vocab_size, config.dim)
    return shapes
