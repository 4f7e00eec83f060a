"""What RL stacks print about two columns, a the trainer's and b the engine's: differences, KL estimates, ratios.

k1, k2, k3 are the estimators of KL(b || a) from tokens that b drew: mean of -d, of d^2 / 2, of exp(d) - 1 - d, with
d = a - b in nats (J. Schulman, "Approximating KL divergence", 2020).
"""

import torch
from torch import Tensor

PERCENTILES = (0.01, 0.5, 0.99)


def statistics(a: Tensor, b: Tensor) -> dict[str, float]:
    """Of N tokens, in nats; ratio_pX are percentiles of exp(a - b)."""
    d = a - b
    ratios = d.exp()
    found = {
        "tokens": float(len(d)),
        "mean_abs_difference": float(d.abs().mean()),
        "max_abs_difference": float(d.abs().max()),
        "k1": float(-d.mean()),
        "k2": float(d.square().mean() / 2),
        "k3": float((ratios - 1 - d).mean()),
    }
    levels = torch.quantile(ratios, torch.tensor(PERCENTILES, dtype=ratios.dtype)).tolist()
    return found | {f"ratio_p{100 * p:02.0f}": x for p, x in zip(PERCENTILES, levels, strict=True)}
