"""Causes are computed from the numbers: planted mistakes that no registry lists are named, and honest noise is not."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mutant_evidence import judge
from nanollama.model import exact_attention, rope_table
from parity.explain import causes
from parity.explain.localise import first_divergence
from parity.explain.rotation import frequencies, pairs, rope_cause
from parity.mutants.edits.edit import Edit, edited, linears, norms, override, with_attention, with_table
from parity.mutants.edits.forward import NOTHING


def later(cfg: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rope_table(cfg, positions + 1)


def other_base(cfg: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rope_table(dataclasses.replace(cfg, rope_theta=1e6), positions)


def other_factor(cfg: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rope_table(
        dataclasses.replace(cfg, rope_scaling=dataclasses.replace(cfg.rope_scaling, factor=4.0)), positions
    )


def other_way(cfg: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(cfg, positions)
    return cos, -sin


def halved_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return exact_attention(q / math.sqrt(q.shape[-1]), k, v, mask)


def warmer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return exact_attention(1.01 * q, k, v, mask)


def blind_to_itself(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    T = q.shape[1]
    see = torch.ones(1, T, T, dtype=torch.bool).tril(-1)
    see[0, 0, 0] = True
    return exact_attention(q, k, v, see if mask is None and T > 1 else mask)


def gelu(nano: Any) -> None:
    for block in nano.model.layers:
        ffn = block.feed_forward
        override(ffn, "forward", lambda x, f=ffn: f.w2(torch.nn.functional.gelu(f.w1(x)) * f.w3(x)))


def no_weight(nano: Any) -> None:
    for norm in norms(nano):
        norm.weight.data = torch.ones_like(norm.weight)


def scaled_embedding(nano: Any) -> None:
    table = nano.model.tok_embeddings
    override(table, "forward", lambda tokens: torch.nn.functional.embedding(tokens, table.weight) * nano.cfg.dim**0.5)


def doubled_v(nano: Any) -> None:
    for block in nano.model.layers:
        block.attention.wv.weight.data *= 2


CASES: list[tuple[str, Edit, str, str]] = [
    ("positions one too high", with_table(later), "layers.0.q_rope", "one too high"),
    ("another base", with_table(other_base), "layers.0.q_rope", "1,000,000"),
    ("another factor", with_table(other_factor), "layers.0.q_rope", "factor of 4"),
    ("another direction", with_table(other_way), "layers.0.q_rope", "wrong direction"),
    ("scaled twice", with_attention(halved_scale), "layers.0.attn_mix", "divided by head_dim"),
    ("scores 1% too large", with_attention(warmer), "layers.0.attn_mix", "scores are 1.01 times"),
    ("blind to itself", with_attention(blind_to_itself), "layers.0.attn_mix", "no token sees itself"),
    ("gelu", gelu, "layers.0.ffn_mix", "GELU"),
    ("norm without weight", no_weight, "layers.0.attn_norm", "weight is not applied"),
    ("embedding times sqrt(dim)", scaled_embedding, "embed", "sqrt(dim)"),
    ("v doubled", doubled_v, "layers.0.v", "2 times"),
]


@pytest.mark.parametrize(("edit", "tap", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_planted_mistake_is_found_and_named(edit: Edit, tap: str, words: str) -> None:
    ev, _ = judge("gqa", edited(edit))
    found = first_divergence(ev)
    assert found is not None
    assert found.tap == tap
    assert words in found.probable_cause
    assert {"layer", "position", "sequence", "rho", "value", "expected"} <= found.as_json().keys()


def test_right_candidate_has_no_divergence() -> None:
    ev, _ = judge("gqa", edited(NOTHING))
    assert first_divergence(ev) is None


def test_operations_that_are_right_alone_are_said_so() -> None:
    def twice(nano: Any) -> None:
        nano.model.layers = torch.nn.ModuleList([nano.model.layers[0], nano.model.layers[0]])

    found = first_divergence(judge("gqa", edited(twice))[0])
    assert found is not None
    assert found.layer == 1
    assert found.operations  # the second layer's operations are wrong by themselves


def test_noise_in_a_projection_is_found_where_it_is() -> None:
    def noisy(nano: Any) -> None:
        target = list(linears(nano))[3]  # wo of layer 0
        generator = torch.Generator().manual_seed(0)
        target.weight.data += 1e-3 * torch.randn(target.weight.shape, generator=generator)

    found = first_divergence(judge("gqa", edited(noisy))[0])
    assert found is not None
    assert found.tap == "layers.0.attn_out"
    assert "output projection" in found.probable_cause


CONFIG = {"head_dim": 16, "rope_theta": 500_000.0, "rope_scaling": None}


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    turned = pairs(x) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (lambda at, f: torch.outer(torch.zeros_like(at), f), "not applied"),
        (lambda at, f: torch.outer(at - 1, f), "one too low"),
        (lambda at, f: torch.outer(torch.full_like(at, 3), f), "counts alike"),
        (lambda at, f: torch.outer(at, 10_000.0 ** (-torch.arange(8) / 8)), "looks like 10,000"),
        (lambda at, f: torch.outer(at, f * (1 + 1e-3)), "drift"),
    ],
)
def test_angles_are_explained(turn: Callable[[Tensor, Tensor], Tensor], words: str) -> None:
    x = torch.randn(61, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    angles = turn(torch.arange(61, dtype=torch.float64), frequencies(CONFIG))
    named = rope_cause(x, rotated(x, angles.double()), CONFIG, None)
    assert named is not None and words in named


def test_an_eps_outside_of_the_root_is_no_smaller_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator, dtype=torch.float64) * torch.logspace(-3, 0, 64).double()[:, None]
    weight, eps = torch.rand(32, generator=generator).double() + 0.5, 2e-5
    right = causes.normed(x, eps) * weight
    outside = x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight
    assert causes._eps(outside, right, x, eps, weight) == "the norm adds eps outside of the root"
    smaller = causes.normed(x, 1e-6) * weight
    assert causes._eps(smaller, right, x, eps, weight) == "the norm's eps looks like 1e-06, the config says 2e-05"
