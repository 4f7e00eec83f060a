"""Muon (Jordan et al., 2024) for the matrices of the blocks beside AdamW for embedding, head and norms: torch's own
both, as one optimizer, whose states are saved and restored as those of any other.

Muon's step has the root mean square of AdamW's (arXiv 2502.16982), so `--lr` and `--weight_decay` mean the same.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from finetune.config import TrainConfig

EMBEDDINGS = ("tok_embeddings.weight", "output.weight")


MOMENTUM = "momentum_buffer"  # torch's name of Muon's one moment


def is_muons(name: str, parameter: nn.Parameter, config: TrainConfig) -> bool:
    """Whether this run's parameter is updated by Muon."""
    return config.optimizer == "muon" and is_orthogonalised(name, parameter)


def is_orthogonalised(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates the parameter: a matrix from features to features, and no table of tokens."""
    return parameter.ndim == 2 and not name.endswith(EMBEDDINGS)


class MuonAndAdamW(torch.optim.Optimizer):
    """The two together: their groups one after the other, one table of states."""

    def __init__(
        self, matrices: list[nn.Parameter], rest: list[dict[str, Any]], *, lr: float, momentum: float, decay: float,
        betas: tuple[float, float], eps: float,
    ) -> None:  # fmt: skip
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True) if rest else None
        self.parts: list[torch.optim.Optimizer] = [muon, *([adamw] if adamw else [])]
        super().__init__([{"params": matrices}, *({"params": group["params"]} for group in rest)], {"lr": lr})
        self.state: Any = defaultdict(dict)
        for part in self.parts:
            part.state = self.state
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
