"""The compiled step: the model's own numbers, from code that is compiled once and found on disk afterwards."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nanollama import compiled
from nanollama.compiled import CompileError, compile_step, is_compiled, matvec, worth_compiling
from nanollama.generate import Llama, Sampling, eager_step
from nanollama.model import KVCache, Transformer
from nanollama.quantize import QuantLinear, quantize_
from test_generate import VOCAB, assert_same_answer, of_row, prompt_ids, small_model


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLLAMA_CACHE", str(tmp_path_factory.mktemp("compiled")))
        yield


def compiled_model(scheme: str | None, dtype: torch.dtype) -> Transformer:
    model = small_model().to(dtype)
    return quantize_(model, scheme) if scheme else model


@pytest.fixture(scope="module")
def pair() -> Llama:
    """Compiled for two rows: it decodes one as well."""
    llama = Llama(small_model(), compile="on")
    llama._steps[1] = llama._steps[2] = compile_step(llama.model, 2)
    return llama


@pytest.mark.parametrize(
    ("scheme", "dtype", "rows", "bound"),
    [
        ("int8", torch.float32, 1, 1e-5),
        pytest.param("int4", torch.float32, 1, 1e-5, marks=pytest.mark.slow),
        pytest.param(None, torch.bfloat16, 1, 0.03, marks=pytest.mark.slow),
        pytest.param("int8", torch.bfloat16, 1, 0.03, marks=pytest.mark.slow),
        pytest.param("int4", torch.bfloat16, 1, 0.03, marks=pytest.mark.slow),
        pytest.param(None, torch.float32, 8, 1e-5, marks=pytest.mark.slow),
        pytest.param("int8", torch.float32, 4, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_are_the_eager_ones(scheme: str | None, dtype: torch.dtype, rows: int, bound: float) -> None:
    """The largest difference of a logit as a share of the largest logit; bf16 rounds at 2^-8 in every layer."""
    model = compiled_model(scheme, dtype)
    steps = [compile_step(model, rows), eager_step(model)]
    caches = [KVCache(model.config, rows, 290, dtype=dtype, device="cpu") for _ in steps]
    positions = 7 * torch.arange(rows) + 250  # over the border between two views of the cache
    with torch.inference_mode():
        for i in range(10):
            ids = torch.tensor(prompt_ids(rows, i))
            got, wanted = (step(ids, positions + i, cache) for step, cache in zip(steps, caches, strict=True))
            assert got.dtype == torch.float32
            assert float((got - wanted).abs().max() / wanted.abs().max()) < bound
    for a, b in zip((*caches[0].k, *caches[0].v), (*caches[1].k, *caches[1].v), strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.abs().max()))


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=2), st.sampled_from([0.0, 1.0]), st.integers(0, 3))
def test_compiled_answers_are_the_eager_ones(pair: Llama, lengths: list[int], temperature: float, seed: int) -> None:
    prompts = [prompt_ids(length, 10 * seed + i) for i, length in enumerate(lengths)]
    # Several stop tokens, so that a row leaves the batch and the other goes on alone.
    sampling = Sampling(max_new_tokens=8, temperature=temperature, seed=seed, stop_ids=frozenset(range(0, VOCAB, 7)))
    fast, slow = list(pair.generate(prompts, sampling)), list(Llama(pair.model).generate(prompts, sampling))
    for i in range(len(prompts)):
        assert_same_answer(of_row(fast, i), of_row(slow, i))


def test_a_shape_is_compiled_once(pair: Llama) -> None:
    lines: list[str] = []
    compile_step(small_model(seed=5), 2, say=lines.append)
    assert lines == []
    assert is_compiled(pair.model, 2)
    assert not is_compiled(pair.model, 4)
    assert not is_compiled(small_model(hidden_dim=64), 2)
    assert not is_compiled(quantize_(small_model(), "int8"), 2)
    assert not is_compiled(small_model().to(torch.bfloat16), 2)


def test_the_compiled_step_reads_the_weights_where_they_are(pair: Llama) -> None:
    step = pair._steps[2]
    assert isinstance(step, compiled.CompiledStep)
    kept = {tensor.data_ptr() for layer in step.layers for tensor in layer}
    assert kept < {parameter.data_ptr() for parameter in pair.model.parameters()}


def test_auto_compiles_where_it_pays(pair: Llama) -> None:
    assert worth_compiling(pair.model, 2, 1)  # on disk
    assert not worth_compiling(small_model(hidden_dim=64), 1, 100)
    assert worth_compiling(small_model(hidden_dim=64), 1, 100_000)
    assert not worth_compiling(small_model(), 9, 100_000)  # more rows than any compiled step takes


class Adapted(nn.Linear):
    """A linear layer that does something more."""


def test_unknown_layers_are_left_to_the_model() -> None:
    model, lines = small_model(), list[str]()
    model.layers[1].attention.wq = Adapted(32, 32, bias=False)
    prompt, sampling = prompt_ids(3, 1), Sampling(max_new_tokens=3)
    with pytest.raises(CompileError, match=r"a layer is a Adapted.*--compile off$"):
        Llama(model, compile="on").generate([prompt], sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanollama.generate.worth_compiling", lambda *_: True)
        auto = Llama(model, compile="auto", say=lines.append)
        assert_same_answer(list(auto.generate([prompt], sampling)), list(Llama(model).generate([prompt], sampling)))
    assert "--compile off" in lines[0]


def test_a_failing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("g++: not found\nand a long story")

    monkeypatch.setattr(compiled, "_compile", fail)
    with pytest.raises(CompileError, match=r"^the decode step cannot be compiled here \(g\+\+: not found\): use --co"):
        compile_step(small_model(hidden_dim=80))


def test_a_position_beyond_the_cache_is_refused(pair: Llama) -> None:
    cache = KVCache(pair.config, 1, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="position 4 does not fit: the cache holds 4 positions"):
        pair._steps[1](torch.tensor([1]), torch.tensor([4]), cache)


@given(st.integers(1, 4), st.integers(1, 33), st.sampled_from([16, 48, 50]), st.sampled_from([None, "int8", "int4"]))
@settings(deadline=None, max_examples=40)
def test_matvec_is_the_product_with_the_dequantised_weights(B: int, N: int, K: int, scheme: str | None) -> None:
    rng = torch.Generator().manual_seed(B * N + K)
    x, weight = torch.randn(B, K, generator=rng), torch.randn(N, K, generator=rng)
    operands: list[Tensor] = [weight]
    if scheme:
        layer = QuantLinear(weight, scheme, torch.float32)
        operands, weight = [layer.numbers, layer.scales], layer.weight
    torch.testing.assert_close(matvec(x, operands), x @ weight.T, rtol=1e-4, atol=1e-4)
