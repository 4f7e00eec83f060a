"""What rotation did RoPE apply? The angle of each pair is measured from its input and output, then explained.

Legend: T positions, H heads, P pairs of features (2j, 2j+1).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parity.contract import DTYPES

PRECISION_RAD = 0.1  # angle errors below this are rounding, above it another formula
IMPRECISE = 0.25  # the part of it that a named way to lose precision may leave
COARSEST = 0.01  # of a frequency or position is the most that rounding to bf16 takes; more is another formula
CLOSE = 0.1  # an explanation may leave this part of the angle error


def frequencies(config: dict[str, Any], theta: float | None = None, factor: float | None = -1.0) -> Tensor:
    """(P,) radians per position, float64. `factor`: -1 as configured, None no scaling."""
    D = config["head_dim"]
    base = (theta or config["rope_theta"]) ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    return scaled(base, config, factor)


def scaled(base: Tensor, config: dict[str, Any], factor: float | None = -1.0) -> Tensor:
    """Unscaled frequencies (P,) float64 with the configured RoPE scaling; `factor` as above."""
    scaling = config["rope_scaling"]
    if factor is None or (factor == -1.0 and scaling is None):
        return base
    scaling = scaling or {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192, "factor": factor}
    factor = scaling["factor"] if factor == -1.0 else factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((scaling["original_context"] * base / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - share) * base / factor + share * base


def pairs(x: Tensor) -> Tensor:
    """(T, H, D) -> complex (T, H, P)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def wrap(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def rope_cause(x: Tensor | None, c: Tensor, config: dict[str, Any], positions: list[int] | None) -> str | None:
    """x, c (T, H, D): before and after the rotation."""
    if x is None or x.shape != c.shape or not torch.isfinite(c).all():
        return None
    before, after = pairs(x), pairs(c)
    turned = (after * before.conj()).sum(1)  # (T, P): the heads' common rotation
    whole = (after.abs() * before.abs()).sum(1).clamp_min(1e-300)
    if float((turned.abs() / whole).median()) < 0.99:
        return _other_pairs(x, c)
    at = torch.arange(c.shape[0], dtype=torch.float64) if positions is None else torch.tensor(positions).double()
    return _named(turned.angle(), at, config)


def _other_pairs(x: Tensor, c: Tensor) -> str:
    """Not one angle a pair: were other features paired?"""
    halves = [torch.complex(*y.chunk(2, -1)) for y in (x, c)]
    turned = (halves[1] * halves[0].conj()).sum(1).abs() / (halves[1].abs() * halves[0].abs()).sum(1).clamp_min(1e-300)
    if float(turned.median()) > 0.99:
        return "RoPE pairs features i and i + D/2, but the rows are in the order of pairs (2i, 2i+1)"
    return "RoPE is no rotation of the pairs (2i, 2i+1): other features are paired, or heads differ in their angle"


def _named(angle: Tensor, at: Tensor, config: dict[str, Any]) -> str | None:
    """angle (T, P) measured, at (T,) positions."""
    named = explained(angle, at, config) or imprecise(angle, at, config)
    turned = torch.outer(at, frequencies(config))
    return named or _precision(wrap(angle - turned), turned, at)


def explained(angle: Tensor, at: Tensor, config: dict[str, Any]) -> str | None:
    """Another formula whose angles these are; None where none is near enough."""
    true = frequencies(config)
    error = wrap(angle - torch.outer(at, true))

    def left(other: Tensor) -> float:
        """The part of the error that another formula's angles (T, P) leave."""
        return float(wrap(angle - other).square().mean().sqrt() / error.square().mean().sqrt())

    scaling, theta = config["rope_scaling"], config["rope_theta"]
    mistakes = {
        "RoPE is not applied, or every position counts as 0": torch.zeros_like(angle),
        "RoPE turns in the wrong direction": -torch.outer(at, true),
        "positions are one too high": torch.outer(at + 1, true),
        "positions are one too low": torch.outer(at - 1, true),
        "every position counts alike": angle[:1].expand_as(angle),
        "RoPE is applied twice": 2 * torch.outer(at, true),
    }
    if scaling is not None:
        mistakes["the RoPE scaling of the checkpoint is dropped"] = torch.outer(at, frequencies(config, factor=None))
    found_factor = _factor(angle, at, config)
    if found_factor is not None:
        says = f"the config says {scaling['factor']:g}" if scaling else "the config has none"
        scaled = torch.outer(at, frequencies(config, factor=found_factor))
        mistakes[f"RoPE is scaled by a factor of {found_factor:.3g}, {says}"] = scaled
    for name, band in _bands(scaling):
        mistakes[name] = torch.outer(at, frequencies(config | {"rope_scaling": band}))
    measured_theta = _theta(angle, at, config["head_dim"])
    thetas = [] if measured_theta is None else dict.fromkeys((rounded(measured_theta), measured_theta))
    for found_theta in thetas:
        for factor in (-1.0, None):
            if factor is None and abs(found_theta / theta - 1) < 1e-3:
                continue  # the config's base without its scaling, which has its own name
            name = f"the RoPE base looks like {found_theta:,.0f}, the config says {theta:,.0f}"
            name += "" if factor == -1.0 or scaling is None else ", and its scaling is dropped"
            mistakes[name] = torch.outer(at, frequencies(config, found_theta, factor))
    name = min(mistakes, key=lambda n: left(mistakes[n]))
    return name if left(mistakes[name]) < CLOSE else None


def _bands(scaling: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, scaling) with another constant in place of the config's."""
    known: dict[str, tuple[float, ...]] = {"low_freq_factor": (1.0, 2.0, 4.0), "high_freq_factor": (2.0, 4.0, 8.0)}
    known["original_context"] = (2048, 4096, 8192, 16384, 131072)
    for key, values in known.items() if scaling else ():
        for value in values:
            other = (scaling or {}) | {key: value}
            if other != scaling and other["low_freq_factor"] < other["high_freq_factor"]:
                yield f"RoPE's {key} looks like {value:g}, the config says {(scaling or {})[key]:g}", other


LOW = {name: DTYPES[name] for name in ("bf16", "fp16")}


def imprecise(angle: Tensor, at: Tensor, config: dict[str, Any]) -> str | None:
    """The way to lose precision that leaves the least of the error of angle (T, P), if that is little."""
    error = wrap(angle - torch.outer(at, frequencies(config))).square().mean().sqrt()
    ways = [(float(wrap(angle - other).square().mean().sqrt()), name) for name, other in _ways(config, at)]
    left, name = min((left, name) for left, name in ways if math.isfinite(left))
    return name if left < IMPRECISE * float(error) else None


def _ways(config: dict[str, Any], at: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, angles (T, P)) of ways to lose precision."""
    exact = frequencies(config)
    for name, dtype in LOW.items():
        yield f"the RoPE frequencies are kept in {name}", torch.outer(at, exact.to(dtype).double())
        yield f"positions are kept in {name}", torch.outer(at.to(dtype).double(), exact)
    step = torch.tensor(config["rope_theta"] ** (-2 / config["head_dim"]))
    for end in (0.0, 1.0):  # the step itself may be an ulp off
        for scale in (step, torch.nextafter(step, torch.tensor(end))):
            products = [torch.tensor(1.0)]
            while len(products) < len(exact):
                products.append(products[-1] * scale)
            made = scaled(torch.stack(products).double(), config).float()
            yield "RoPE frequencies are repeated products", torch.outer(at.float(), made).double()  # angles in float32


def slope(angle: Tensor, at: Tensor) -> Tensor | None:
    """(P,) radians per position, from the neighbouring positions at the start, refined over their whole length."""
    steps = at.diff()
    end = int((steps != 1).nonzero()[0]) + 1 if bool((steps != 1).any()) else len(at)
    at, angle = at[:end], angle[:end]
    if end < 3:
        return None
    turn = torch.polar(torch.ones_like(angle), angle)
    rough = (turn[1:] * turn[:-1].conj()).sum(0).angle()
    n = len(at) - 1
    total = wrap(angle[-1] - angle[0])
    return (total + 2 * math.pi * torch.round((rough * n - total) / (2 * math.pi))) / n


def _theta(angle: Tensor, at: Tensor, head_dim: int) -> float | None:
    """The base, from the second fastest pair: no scaling touches it, and it is not 1 for every base."""
    found = slope(angle, at)
    if found is None or head_dim < 4 or not 0 < float(found[1]) < 1:
        return None
    return float(found[1]) ** (-head_dim / 2)


def _factor(angle: Tensor, at: Tensor, config: dict[str, Any]) -> float | None:
    """The scaling factor, from the slowest pair."""
    found = slope(angle, at)
    if found is None or not float(found[-1]) > 0:
        return None
    factor = float(frequencies(config, factor=None)[-1] / found[-1])
    return rounded(factor) if factor > 1.05 else None


def rounded(x: float) -> float:
    """To two digits where that is within 1%, as such constants are written."""
    digits = 1 - math.floor(math.log10(abs(x)))
    near = round(x, digits)
    return near if abs(near - x) < 0.01 * x else x


def _precision(error: Tensor, turned: Tensor, at: Tensor) -> str | None:
    """Small errors (T, P) beside the right angles: do they grow with the position (frequencies) or not (table)?"""
    size = error.abs()
    if float(size.quantile(0.9)) > PRECISION_RAD and float(size[: max(2, len(at) // 8)].max()) > PRECISION_RAD:
        return None
    near, far = size[1 : 1 + len(at) // 4].mean(), size[-(len(at) // 4) - 1 :].mean()
    if float(far) > 2.5 * float(near):
        last, right = size[-(len(at) // 4) - 1 :].mean(0), turned[-(len(at) // 4) - 1 :].mean(0)
        if float((last / right)[last > last.max() / 2].min()) > COARSEST:
            return None
        return "the angles drift with the position: inverse frequencies or positions in low precision"
    return "the angles are coarse: the cos/sin table is kept in low precision"
