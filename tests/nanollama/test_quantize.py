"""Quantisation: how far weights may move, what the packed form means, and that loading never holds both forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama.model import ModelConfig, Transformer
from nanollama.speed.quantize import (
    SCHEMES,
    QuantLinear,
    dequantize,
    group_size,
    load_quantized,
    quantize_int4,
    quantize_int8,
    weight_bytes,
)

CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, hidden_dim=96, max_seq_len=64)


def random_model(config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config).eval()


def kl_nats(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 90), st.floats(1e-6, 1e4), st.integers(0, 9))
def test_int8_moves_no_weight_by_more_than_half_a_step_of_its_row(n: int, k: int, scale: float, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * scale
    numbers, scales = quantize_int8(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((dequantize(numbers, scales) - weight).abs() <= step * 0.50001).all())


@settings(max_examples=30)
@given(st.integers(1, 20), st.sampled_from([32, 48, 64, 96, 288, 768]), st.integers(0, 9))
def test_int4_moves_no_weight_by_more_than_one_step_of_its_group(n: int, k: int, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    group = group_size(k)
    numbers, scales = quantize_int4(weight, group)
    assert (numbers.shape, scales.shape) == ((n, group // 2, k // group), (n, k // group))
    error = (dequantize(numbers, scales) - weight).abs().unflatten(1, (group, -1))
    step = weight.abs().unflatten(1, (group, -1)).amax(dim=1, keepdim=True) / 8
    # One step and not half of one: +8 is not a 4-bit number, so what is near +largest becomes 7; bf16 adds 2^-8.
    assert bool((error <= step * 1.05).all())


def test_the_int4_layout_is_the_documented_one() -> None:
    weight = torch.arange(-8.0, 8.0).repeat(3, 4)  # (3, 64), every group spans the whole range
    numbers, scales = quantize_int4(weight, 4)
    n, j, c, columns = 2, 1, 5, 16
    assert int(numbers[n, j, c] & 15) - 8 == round(float(weight[n, j * columns + c] / scales[n, c].float()))
    assert int(numbers[n, j, c] >> 4) - 8 == round(float(weight[n, (j + 2) * columns + c] / scales[n, c].float()))


def test_rows_of_zeros_stay_zeros() -> None:
    zeros = torch.zeros(3, 64)
    assert not dequantize(*quantize_int8(zeros)).any()
    assert not dequantize(*quantize_int4(zeros, 16)).any()


@pytest.mark.parametrize(
    ("inputs", "size"), [(288, 18), (768, 24), (2048, 32), (4096, 32), (14336, 32), (48, 24), (2, 2)]
)
def test_groups_divide_the_inputs(inputs: int, size: int) -> None:
    assert group_size(inputs) == size


def test_an_odd_number_of_inputs_is_refused_by_int4() -> None:
    with pytest.raises(ValueError, match="a layer has 33 inputs: use int8"):
        group_size(33)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("scheme", "bound_nats"), [("int8", 1e-4), ("int4", 2e-2)])
def test_a_quantised_model_stays_close(scheme: str, bound_nats: float, tied: bool) -> None:
    config = ModelConfig(**{**CONFIG.__dict__, "tied": tied})
    model = random_model(config)
    tokens = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(tokens)
        got = load_quantized(config, model.state_dict(), scheme)(tokens)
    assert 0 < float(kl_nats(wanted, got).max()) < bound_nats


@pytest.mark.parametrize(("scheme", "share"), [("int8", 0.27), ("int4", 0.18)])
def test_quantised_weights_take_the_memory_that_they_should(scheme: str, share: float) -> None:
    config = ModelConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=11, hidden_dim=512)
    model = random_model(config)
    before = weight_bytes(model)
    assert weight_bytes(load_quantized(config, model.state_dict(), scheme)) < share * before


def test_the_weights_that_a_head_stands_for_can_be_read() -> None:
    model = load_quantized(CONFIG, random_model().state_dict(), "int8")
    assert model.head().shape == (101, 64)
    assert isinstance(model.output, QuantLinear)


def test_changing_the_dtype_leaves_integers_and_scales_as_they_are() -> None:
    model = load_quantized(CONFIG, random_model().state_dict(), "int8").to(torch.bfloat16)
    layer = model.layers[0].attention.wq
    assert (layer.numbers.dtype, layer.scales.dtype, layer.weight.dtype) == (
        torch.int8,
        torch.float32,
        torch.bfloat16,
    )
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_weights_are_read_once_and_one_at_a_time() -> None:
    weights, alive = random_model().state_dict(), []

    class Counting(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> torch.Tensor:
            alive.append(name)
            return weights[name].clone()

    load_quantized(CONFIG, Counting(weights), "int8")
    read = [name for name in alive if name != "norm.weight"]
    assert len(read) == len(set(read))
    assert set(alive) == set(weights)


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="quantize is 'int3': expected one of " + ", ".join(SCHEMES)):
        load_quantized(CONFIG, random_model().state_dict(), "int3")
