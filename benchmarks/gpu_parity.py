"""Logits of `benchmarks.gpu`'s models beside transformers', with equal weights: how far each is from an fp32 run.

python -m benchmarks.gpu_sections parity /tmp/parity.jsonl
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_models import DTYPES, Bench, Item, random_ids, seeded_weights
from nanollama.model import ModelConfig, Transformer


def parity_items(bench: Bench) -> Iterator[Item]:
    yield "1B logits", lambda: distances(bench, "1B", 512)
    yield "8B logits", lambda: distances(bench, "8B", 256)


@torch.inference_mode()
def distances(bench: Bench, shape: str, length: int) -> dict[str, Any]:
    """Logits of the same weights: ours and transformers' in bf16, both against an fp32 run, and the two fp32 runs."""
    config = bench.shapes[shape]
    weights = seeded_weights(config, bench.device, torch.bfloat16)
    tokens = torch.tensor(random_ids(config, 1, length), device=bench.device)
    found = {}
    for dtype, of in DTYPES.items():
        for attention in ("fast", "exact"):
            model = Transformer.from_weights(config, weights, dtype=of, device=bench.device, attention=attention)
            found[f"{attention} {dtype}"] = model.eval()(tokens)
            del model
        for attention in ("sdpa", "eager"):
            found[f"transformers {attention} {dtype}"] = transformers_logits(config, weights, of, tokens, attention)
    pairs = [(f"{name} bf16", "fast fp32") for name in ("fast", "exact", "transformers sdpa", "transformers eager")]
    pairs += [("fast bf16", "transformers sdpa bf16"), ("exact bf16", "transformers eager bf16")]
    pairs += [(f"{name} fp32", "transformers eager fp32") for name in ("fast", "exact", "transformers sdpa")]
    return {
        "distance": {f"{a} - {b}": distance(found[a], found[b]) for a, b in pairs},
        "largest": {f"{a} - {b}": largest(found[a], found[b]) for a, b in pairs},
    }


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b over that of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def largest(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| over the root mean square of b."""
    return float((a.double() - b.double()).abs().max() / b.double().square().mean().sqrt())


def transformers_logits(
    config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype, tokens: Tensor, attention: str
) -> Tensor:
    """Logits (1, T, V) of LlamaForCausalLM around the same weights."""
    import transformers
    from transformers.models.llama import modeling_llama

    from nanollama.checkpoint.hf import make_hf_config
    from nanollama.checkpoint.names import hf_name, is_rotary, to_hf_rows

    like = transformers.LlamaConfig.from_dict(make_hf_config(config, dtype))
    like._attn_implementation = attention
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(like).eval()
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(like).to(tokens.device)
    rows = {n: to_hf_rows(w, config.head_dim) if is_rotary(n) else w for n, w in weights.items()}
    state = {hf_name(n): w.to(dtype) for n, w in rows.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True, assign=True)
    return model(tokens, use_cache=False).logits.float()
