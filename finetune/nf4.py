"""QLoRA's base: linear layers in 4-bit NormalFloat (arXiv 2305.14314) through torchao, where it is installed.

The only file that knows torchao's import paths, which move between releases.

    python -m finetune.text --data notes/ --ckpt Llama-3.2-1B --method qlora
"""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from nanollama.checkpoint.adapter import LINEARS
from nanollama.model import Transformer

BLOCK, SCALER_BLOCK = 64, 256  # weights that share a scale, and scales that share one: QLoRA's
PATHS = ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor")  # newest first
EXTRA = "--method qlora needs the package torchao: pip install 'nanollama[lean]'"


class NF4Linear(nn.Module):
    """A frozen linear layer without bias; gradients flow through it to its input."""

    nf4: Any  # torchao's NF4Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        to_nf4, self._multiply = _torchao()
        if weight.numel() % (BLOCK * SCALER_BLOCK):
            raise ValueError(
                f"--method qlora: a matrix of {tuple(weight.shape)} is no multiple of {BLOCK * SCALER_BLOCK} numbers, "
                "which share their scales: use --method lora"
            )
        self.register_buffer("nf4", to_nf4(weight.detach(), BLOCK, SCALER_BLOCK), persistent=False)

    @property
    def weight(self) -> Tensor:
        """What the 4 bits stand for, (outputs, inputs) in the dtype that was quantised."""
        return self.nf4.get_original_weight()

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.nf4)


def quantize_base_(model: Transformer) -> None:
    """Every linear layer of the blocks in 4 bits; embedding, norms and head stay as they are. Raises ValueError."""
    for block in model.layers:
        for parent in (block.attention, block.feed_forward):
            for name in [n for n in LINEARS if hasattr(parent, n)]:
                setattr(parent, name, NF4Linear(getattr(parent, name).weight))


def _torchao() -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """(to_nf4, linear_nf4). Raises ValueError that names the extra."""
    for path in PATHS:
        with suppress(ImportError):
            module = import_module(path)
            return module.to_nf4, module.linear_nf4
    raise ValueError(EXTRA)
