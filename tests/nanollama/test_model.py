"""The model by itself: cache, chunks, rows, documents, errors; and that the oracle shares nothing with it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nanollama.model as model_module
from nanollama.checkpoint import open_checkpoint
from nanollama.model import KVCache, ModelConfig, RopeScaling, Transformer, rope_table
from parity.measure.metrics import TapError, noise_rms, ratio
from parity.measure.tolerances import BOUNDS
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES
from parity.trace import Trace
from reference.oracle.run import run_case
from reference.protocol import Case

TOKENS = torch.randint(300, (1, 37), generator=torch.Generator().manual_seed(0))
BOUND = BOUNDS["G3.logits"].value


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "ckpt"
    synthesise(replace(SHAPES["tiny"], vocab_size=300, n_layers=2), folder)
    return folder


def run_oracle(checkpoint: Path, out: Path) -> Path:
    case = Case(str(checkpoint), dtypes=("fp32",), prompts=[TOKENS[0].tolist()], rope_positions=(0, 8191, 131071))
    run_case(case, out)
    return out


@pytest.fixture(scope="module")
def truth(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_oracle(checkpoint, tmp_path_factory.mktemp("oracle") / "trace")


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> dict[str, Transformer]:
    opened = open_checkpoint(checkpoint)
    weights = {name: opened.weights[name].float() for name in opened.weights}
    return {path: Transformer.from_weights(opened.config, weights, attention=path) for path in ("exact", "fast")}


def error_of(logits: Tensor, oracle: Tensor) -> TapError:
    error = TapError()
    error.add(0, logits, oracle)
    return error


@pytest.mark.parametrize("path", ["exact", "fast"])
@settings(max_examples=25)
@given(cuts=st.sets(st.integers(1, 36), max_size=12))
def test_any_split_into_chunks_and_steps_gives_the_full_logits(
    path: str, models: dict[str, Transformer], truth: Path, cuts: set[int]
) -> None:
    model, oracle = models[path], Trace(truth).get("fp32", 0, "logits")
    cache = KVCache(model.config, 1, 40, dtype=torch.float32, device="cpu")
    edges = [0, *sorted(cuts), 37]
    with torch.inference_mode():
        full = models["exact"](TOKENS)[0]
        pieces = [model(TOKENS[:, a:b], cache=cache)[0] for a, b in pairwise(edges)]
    floor = noise_rms(error_of(full, oracle), "fp32")
    assert ratio(error_of(torch.cat(pieces), oracle).rms(), floor) <= BOUND


@pytest.mark.parametrize("path", ["exact", "fast"])
def test_rows_of_different_lengths_decode_together(path: str, models: dict[str, Transformer]) -> None:
    model = models[path]
    lengths = torch.tensor([5, 9, 2])
    cache = KVCache(model.config, 3, 16, dtype=torch.float32, device="cpu")
    prompts = TOKENS[0, :27].view(3, 9)
    with torch.inference_mode():
        model(prompts, positions=torch.arange(9).expand(3, 9), cache=cache)  # padding is written, and never seen
        step = model(torch.tensor([[7], [8], [9]]), positions=lengths.unsqueeze(1), cache=cache)
        for row, (n, token) in enumerate(zip(lengths.tolist(), (7, 8, 9), strict=True)):
            alone = model(torch.cat([prompts[row, :n], torch.tensor([token])]).unsqueeze(0))[0, -1]
            assert torch.allclose(step[row, 0], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", ["exact", "fast"])
def test_documents_of_a_packed_row_do_not_see_each_other(path: str, models: dict[str, Transformer]) -> None:
    model, doc_ids = models[path], torch.tensor([[0] * 11 + [1] * 26])
    positions = torch.cat([torch.arange(11), torch.arange(26)]).unsqueeze(0)
    changed = TOKENS.clone()
    changed[:, :11] = changed[:, :11].flip(1)
    with torch.inference_mode():
        packed, other = (model(t, positions=positions, doc_ids=doc_ids)[0, 11:] for t in (TOKENS, changed))
        alone, visible = model(TOKENS[:, 11:])[0], model(TOKENS)[0, 11:]
    assert torch.equal(packed, other)
    assert torch.allclose(packed, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(packed, visible, atol=1e-2)


def test_tied_heads_share_one_parameter() -> None:
    config = ModelConfig(16, 1, 2, 1, 50, 24, tied=True)
    model = Transformer(config)
    assert model.head() is model.tok_embeddings.weight
    assert "output.weight" not in model.state_dict()
    assert "output.weight" in Transformer(replace(config, tied=False)).state_dict()


def test_the_rope_table_stays_float32_in_a_bf16_model() -> None:
    model = Transformer(ModelConfig(16, 1, 2, 1, 50, 24)).to(torch.bfloat16)
    context = model.context(torch.zeros(1, 4, dtype=torch.long))
    assert context.cos.dtype == context.sin.dtype == torch.float32


def test_training_works_after_inference() -> None:
    model = Transformer(ModelConfig(16, 1, 2, 1, 50, 24))
    with torch.inference_mode():
        model(torch.zeros(1, 4, dtype=torch.long))
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("head_dim", [2, 4, 8, 16, 32, 64, 128])
def test_rotation_has_metas_bits_at_every_head_dim(head_dim: int) -> None:
    from llama_models.llama3.model import apply_rotary_emb, precompute_freqs_cis

    config = ModelConfig(head_dim, 1, 1, 1, 50, 24)
    for length in (1, 7, 61, 257):
        q, k = torch.randn(2, 1, length, 3, head_dim, generator=torch.Generator().manual_seed(length))
        theirs = apply_rotary_emb(q, k, precompute_freqs_cis(head_dim, length, config.rope_theta))
        cos, sin = (t.unsqueeze(0) for t in rope_table(config, torch.arange(length)))
        assert torch.equal(model_module.apply_rope(q, cos, sin), theirs[0])
        assert torch.equal(model_module.apply_rope(k, cos, sin), theirs[1])


def test_scaling_changes_long_wavelengths_only() -> None:
    plain = ModelConfig(64, 1, 1, 1, 50, 24, head_dim=64)
    ratios = model_module.rope_frequencies(replace(plain, rope_scaling=RopeScaling())) / model_module.rope_frequencies(
        plain
    )
    assert ratios[0] == 1 and ratios[-1] == 1 / 8
    assert bool((ratios[1:] <= ratios[:-1]).all())


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"n_kv_heads": 3}, "n_kv_heads 3"), ({"n_layers": 0}, "n_layers is 0"), ({"head_dim": 7}, "head_dim 7 is odd")],
)
def test_impossible_configs_are_refused(fields: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(ModelConfig(16, 1, 4, 2, 50, 24), **fields)


def test_misuse_of_the_cache_is_refused() -> None:
    model = Transformer(ModelConfig(16, 1, 2, 1, 50, 24))
    cache, tokens = KVCache(model.config, 1, 4, dtype=torch.float32, device="cpu"), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="position 4 does not fit: the cache holds 4"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="doc_ids and a cache"):
        model(tokens[:, :2], doc_ids=tokens[:, :2], cache=cache)
    with pytest.raises(ValueError, match="attention 'flash' is unknown"):
        Transformer(model.config, attention="flash")


def plants() -> Iterator[object]:
    """The five errors of the command line's tests, planted in nanollama's own functions."""
    frequencies, rope = model_module.rope_frequencies, model_module.apply_rope

    def default_eps(self: model_module.RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)

    def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), cos, sin)

    def swapped(self: model_module.FeedForward, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w3(x)) * self.w1(x))

    yield patch.object(model_module, "rope_frequencies", lambda c: frequencies(replace(c, rope_theta=1e4)))
    yield patch.object(model_module, "rope_frequencies", lambda c: frequencies(replace(c, rope_scaling=None)))
    yield patch.object(model_module, "apply_rope", half_split)
    yield patch.object(model_module.RMSNorm, "forward", default_eps)
    yield patch.object(model_module.FeedForward, "forward", swapped)


@pytest.mark.parametrize("plant", list(plants()))
def test_errors_planted_in_nanollama_leave_the_oracle_as_it_is(
    plant: object, checkpoint: Path, truth: Path, models: dict[str, Transformer], tmp_path: Path
) -> None:
    model = models["exact"]
    with torch.inference_mode():
        right = model(TOKENS)
        with plant:  # type: ignore[attr-defined]
            model._rope = None  # the table is rebuilt by the planted function
            wrong = model(TOKENS)
            again = run_oracle(checkpoint, tmp_path / "trace")
        model._rope = None
    assert not torch.equal(right, wrong)
    for file in sorted(p.relative_to(truth) for p in truth.rglob("*.safetensors")):
        assert (truth / file).read_bytes() == (again / file).read_bytes(), file


def test_far_positions_of_the_table_match_the_oracles(checkpoint: Path, truth: Path) -> None:
    cos, sin = rope_table(open_checkpoint(checkpoint).config, torch.tensor([0, 8191, 131071]))
    theirs = Trace(truth).rope()
    assert float((cos - theirs["cos"]).abs().max()) <= 2.0**-23
    assert float((sin - theirs["sin"]).abs().max()) <= 2.0**-23
