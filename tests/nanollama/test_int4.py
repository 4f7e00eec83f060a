"""int4 in torch's layout: what the packed bytes mean, how near the weights come, the product by the kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from nanollama.speed import int4
from nanollama.speed.kernels import matvec
from nanollama.speed.quantize import (
    PROMPT_ROWS,
    PackedLinear,
    QuantLinear,
    dequantize,
    load_quantized,
    quantize_int4,
    quantized_linear,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20)
@given(st.sampled_from([64, 128, 192]), st.sampled_from([32, 64, 96]), st.floats(1e-4, 1e3), st.integers(0, 9))
def test_no_weight_moves_by_more_than_a_step_of_its_group(n: int, k: int, scale: float, seed: int) -> None:
    weight = normal(n, k, seed=seed) * scale
    groups = weight.unflatten(1, (-1, int4.GROUP))
    error = (int4.dequantize(*int4.quantize(weight)) - weight).unflatten(1, (-1, int4.GROUP))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert bool((error.abs().amax(-1) <= 1.5 * step).all())


def test_what_four_bits_can_hold_comes_back_exactly() -> None:
    numbers = torch.arange(16.0).repeat(64, 4)  # (64, 64): each group holds every number twice
    weight = numbers * torch.tensor([0.5, 0.25]).repeat_interleave(32) + 3
    assert torch.equal(int4.dequantize(*int4.quantize(weight)), weight)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant_group_is_its_zero_point(value: float) -> None:
    weight = torch.full((64, 32), value)
    assert torch.equal(int4.dequantize(*int4.quantize(weight)), weight)


def test_the_line_that_fits_beats_the_largest_number() -> None:
    weight = normal(64, 512).abs() ** 1.5
    plain = dequantize(*quantize_int4(weight, int4.GROUP))
    error, plain_error = (float((x - weight).square().mean()) for x in (int4.dequantize(*int4.quantize(weight)), plain))
    assert error < 0.5 * plain_error


@pytest.mark.parametrize("rows", [1, 5, PROMPT_ROWS, PROMPT_ROWS + 1])
def test_the_layer_multiplies_by_the_weights_that_it_stands_for(rows: int) -> None:
    weight, x = normal(192, 64), normal(rows, 64, seed=1).to(torch.bfloat16)
    layer = quantized_linear(weight, "int4", torch.bfloat16, torch.device("cpu"))
    assert type(layer) is PackedLinear
    exact = x.double() @ int4.dequantize(layer.numbers, layer.scales).double().T
    # One rounding of the answer to bf16; with many rows one of the weights, too.
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=2**-8 * float(exact.abs().max()))
    torch.testing.assert_close(layer.rows(64, 128), layer.weight[64:128], rtol=0, atol=0)
    if rows <= PROMPT_ROWS:
        assert torch.equal(matvec(x, [layer.numbers, layer.scales]), layer(x))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((80, 64), torch.bfloat16), ((64, 48), torch.bfloat16), ((64, 64), torch.float32)]
)
def test_other_shapes_and_dtypes_keep_the_plain_form(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert type(quantized_linear(normal(*shape), "int4", dtype, torch.device("cpu"))) is QuantLinear


def test_a_model_that_changes_its_dtype_still_answers() -> None:
    model = tiny.model(dim=64, hidden_dim=128, vocab_size=128).to(torch.bfloat16)
    packed = load_quantized(model.config, model.state_dict(), "int4")
    tokens = torch.arange(12).unsqueeze(0)
    with torch.inference_mode():
        narrow, wide = packed(tokens).float(), packed.float()(tokens)
    assert wide.dtype == torch.float32
    assert float((wide - narrow).norm() / wide.norm()) < 0.05  # bf16's rounding in one and not in the other
