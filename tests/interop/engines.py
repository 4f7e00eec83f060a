"""What the interop tests share: llama.cpp as a plain function, the float64 oracle, and ggml's own rounding imitated.

ggml converts the input of every matrix product to the type of the weights (F32, F16, BF16, or Q8_0's int8 blocks).
`rounded_like_ggml` does the same to our model, so its distance to the oracle is the error that an engine of that type
makes by design: the noise to which llama.cpp is held.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanollama.checkpoint import open_checkpoint
from nanollama.checkpoint.names import weight_shapes
from nanollama.model import ModelConfig, Transformer
from parity.peers.ggml import without_repacking
from reference.files import open_folder
from reference.oracle.forward import Oracle, forward

Round = Callable[[Tensor], Tensor]


def q8_0(x: Tensor) -> Tensor:
    """Blocks of 32 numbers as int8 with one fp16 scale, and back."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (torch.round(blocks / safe) * scale.half().float()).flatten(-2)


ROUNDING: dict[str, Round] = {
    "fp32": lambda x: x,
    "fp16": lambda x: x.half().float(),
    "bf16": lambda x: x.bfloat16().float(),
    "q8_0": q8_0,
}


class LlamaCpp:
    """llama.cpp on one thread with a float32 cache, through llama-cpp-python."""

    def __init__(self, path: Path, *, n_ctx: int = 512, vocab_only: bool = False) -> None:
        import llama_cpp

        options: dict[str, Any] = {"vocab_only": True} if vocab_only else {"logits_all": True, "n_batch": n_ctx}
        f32 = llama_cpp.GGML_TYPE_F32
        with without_repacking(llama_cpp.llama_cpp):
            self.llama = llama_cpp.Llama(
                str(path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32, verbose=False, **options
            )

    def logits(self, tokens: Sequence[int], max_new_tokens: int = 0) -> tuple[list[int], Tensor]:
        """The tokens with their greedy continuation, and the logits (T, V) by which each next one was chosen."""
        self.llama.reset()
        self.llama.eval(list(tokens))
        found = list(tokens)
        for _ in range(max_new_tokens):
            found.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
            self.llama.eval(found[-1:])
        return found, torch.from_numpy(self.llama.scores[: self.llama.n_tokens].copy())

    def encode(self, text: str) -> list[int]:
        """As plain text, without BOS: special tokens' names are text too."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=False)

    def close(self) -> None:
        self.llama.close()


def decisive_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Seeded float32 weights that show errors: peaked attention, norms unlike each other, clear winners in the head."""
    generator = torch.Generator().manual_seed(seed)
    gains = {"wq.weight": 2.0, "wk.weight": 2.0, "wo.weight": 0.5, "w2.weight": 0.5}
    weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = 0.5 + torch.rand(shape, generator=generator)
            continue
        rows = torch.exp(0.75 * torch.randn(shape[0], 1, generator=generator)) if shape[0] == config.vocab_size else 1.0
        gain = gains.get(name.split(".", 3)[-1], 1.0)
        weights[name] = torch.randn(shape, generator=generator) * rows * gain / shape[1] ** 0.5
    return weights


def oracle_logits(folder: Path, tokens: list[int], rows: list[int]) -> Tensor:
    """Float64 logits (len(rows), V) of a Meta or Hugging Face folder's stored weights."""
    oracle = Oracle(open_folder(folder), [tokens], None)
    with torch.inference_mode():
        normed = forward(oracle, lambda name, value: None)[rows]
        return torch.cat([block for _, _, block in oracle.logit_blocks(normed)], dim=1)


@contextmanager
def rounded_like_ggml(model: nn.Module, type_name: str) -> Iterator[None]:
    """Each linear layer's input is rounded first."""
    rounding = ROUNDING[type_name]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(lambda _, args: rounding(args[0])) for module in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def our_logits(folder: Path, tokens: list[int], rows: list[int], type_name: str) -> Tensor:
    """Ours in float32 with ggml's rounding, (len(rows), V)."""
    opened = open_checkpoint(folder)
    weights = {name: opened.weights[name].float() for name in opened.weights}
    model = Transformer.from_weights(opened.config, weights, dtype=torch.float32)
    with torch.inference_mode(), rounded_like_ggml(model, type_name):
        hidden = model.hidden(torch.tensor([tokens]))[0, rows]
        return ROUNDING[type_name](hidden) @ model.head().T


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def ratio(candidate: Tensor, noisy: Tensor, oracle: Tensor) -> float:
    """How many times larger the candidate's error is than the error that is made by design (at least float32's)."""
    return rms(candidate - oracle) / max(rms(noisy - oracle), 2.0**-24 * rms(oracle) / 2)


def decided(noisy: Tensor, oracle: Tensor) -> Tensor:
    """(T,) bool: positions where the best logit leads by more than four times the largest error of the row."""
    top = oracle.topk(2, dim=1).values
    return top[:, 0] - top[:, 1] > 4 * (noisy - oracle).abs().amax(dim=1)
