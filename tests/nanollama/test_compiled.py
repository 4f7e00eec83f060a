"""The compiled step: the model's own numbers, from code that is compiled once and found on disk afterwards."""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from generation_cases import VOCAB, assert_same_answer, of_row, prompt_ids
from nanollama.checkpoint.weights import DTYPES
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import KVCache, Transformer
from nanollama.speed import kernels, package
from nanollama.speed.compiled import CompiledStep, CompileError
from nanollama.speed.kernels import in_words, matvec
from nanollama.speed.package import compile_step, is_compiled, worth_compiling
from nanollama.speed.quantize import SCHEMES, PackedLinear, QuantLinear, dequantize, load_quantized
from nanollama.speed.step import Step, eager_step

NOISE_RATIO = 2  # as G3; more where so few sums hardly average the noise of integers up to 127, or 15 less 8
INT8_RATIO, INT4_RATIO = 4, 8


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLLAMA_CACHE", str(tmp_path_factory.mktemp("compiled")))
        yield


def compiled_model(scheme: str | None, dtype: torch.dtype, **changes: int) -> Transformer:
    model = tiny.model(**changes).to(dtype)
    return load_quantized(model.config, model.state_dict(), scheme) if scheme else model


@pytest.fixture(scope="module")
def pair() -> Llama:
    """Compiled for two rows: it decodes one as well."""
    llama = Llama(tiny.model(), compile="on")
    llama.steps.compiled[1] = llama.steps.compiled[2] = compile_step(llama.model, 2)
    return llama


def in_float64(model: Transformer) -> Transformer:
    """The same weights, matrix products in float64; norms and the RoPE table stay fp32, as the model has them."""
    twin = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            parent, _, last = name.rpartition(".")
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = dequantize(layer.numbers, layer.scales)
            setattr(twin.get_submodule(parent), last, linear)
    return twin.double()


def errors_of(steps: Sequence[Step], model: Transformer, rows: int) -> list[float]:
    """Relative root mean square errors of ten tokens' logits and the cache after them, against float64."""
    steps = [eager_step(in_float64(model)), *steps]
    dtypes = [torch.float64, *[model.tok_embeddings.weight.dtype] * (len(steps) - 1)]
    caches = [KVCache(model.config, rows, 320, dtype=dtype, device="cpu") for dtype in dtypes]
    positions = 7 * torch.arange(rows) + 250  # over the border between two views of the cache
    logits: list[list[Tensor]] = [[] for _ in steps]
    with torch.inference_mode():
        for i in range(10):
            ids = torch.tensor(prompt_ids(rows, i))
            for step, cache, said in zip(steps, caches, logits, strict=True):
                said.append(step(ids, positions + i, cache))
    found = [
        torch.cat([x.double().flatten() for x in (*said, *c.k, *c.v)]) for said, c in zip(logits, caches, strict=True)
    ]
    return [float((x - found[0]).norm() / found[0].norm()) for x in found[1:]]


@pytest.mark.parametrize(
    ("scheme", "dtype", "rows", "bound"),
    [
        ("int8", torch.float32, 1, INT8_RATIO),
        pytest.param("int4", torch.float32, 1, INT4_RATIO, marks=pytest.mark.slow),
        pytest.param(None, torch.bfloat16, 1, NOISE_RATIO, marks=pytest.mark.slow),
        pytest.param("int8", torch.bfloat16, 1, NOISE_RATIO, marks=pytest.mark.slow),
        pytest.param("int4", torch.bfloat16, 1, NOISE_RATIO, marks=pytest.mark.slow),
        pytest.param(None, torch.float32, 8, NOISE_RATIO, marks=pytest.mark.slow),
        pytest.param("int8", torch.float32, 4, INT8_RATIO, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_are_as_exact_as_eager_ones(
    scheme: str | None, dtype: torch.dtype, rows: int, bound: float
) -> None:
    model = compiled_model(scheme, dtype)
    fast, slow = errors_of([compile_step(model, rows), eager_step(model)], model, rows)
    assert fast <= bound * slow


@pytest.mark.slow
def test_the_compiled_step_multiplies_packed_int4_as_the_model_does() -> None:
    model = compiled_model("int4", torch.bfloat16, dim=64, hidden_dim=128, vocab_size=128)
    assert isinstance(model.layers[0].attention.wq, PackedLinear)
    fast, slow = errors_of([compile_step(model, 1), eager_step(model)], model, 1)
    assert fast <= NOISE_RATIO * slow


def test_a_step_that_is_a_little_wrong_is_not_as_exact() -> None:
    model = compiled_model("int8", torch.float32)
    wrong = copy.deepcopy(model)
    wrong.layers[1].attention.wq.scales *= 1 + 2**-13  # type: ignore[operator]
    off, right = errors_of([eager_step(wrong), eager_step(model)], model, 1)
    assert off > INT8_RATIO * right


@settings(max_examples=10)
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
    compile_step(tiny.model(seed=5), 2, say=lines.append)
    assert lines == []
    assert is_compiled(pair.model, 2)
    assert not is_compiled(pair.model, 4)
    assert not is_compiled(tiny.model(hidden_dim=64), 2)
    assert not is_compiled(compiled_model("int8", torch.float32), 2)
    assert not is_compiled(tiny.model().to(torch.bfloat16), 2)


def test_the_compiled_step_reads_the_weights_where_they_are(pair: Llama) -> None:
    step = pair.steps.compiled[2]
    assert isinstance(step, CompiledStep)
    kept = {tensor.data_ptr() for layer in step.layers for tensors in layer for tensor in tensors}
    assert kept < {parameter.data_ptr() for parameter in pair.model.parameters()}


def test_auto_compiles_where_it_pays(pair: Llama) -> None:
    assert worth_compiling(pair.model, 2, 1)  # on disk
    assert not worth_compiling(tiny.model(hidden_dim=64), 1, 100)
    assert worth_compiling(tiny.model(hidden_dim=64), 1, 100_000)
    assert not worth_compiling(tiny.model(), 9, 100_000)  # more rows than any compiled step takes


class Adapted(nn.Linear):
    """A linear layer that does something more."""


def test_unknown_layers_are_left_to_the_model() -> None:
    model, lines = tiny.model(), list[str]()
    model.layers[1].attention.wq = Adapted(32, 32, bias=False)
    prompt, sampling = prompt_ids(3, 1), Sampling(max_new_tokens=3)
    with pytest.raises(CompileError, match=r"a layer is a Adapted.*--compile off$"):
        Llama(model, compile="on").generate([prompt], sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanollama.speed.step.worth_compiling", lambda *_: True)
        auto = Llama(model, compile="auto", say=lines.append)
        assert_same_answer(list(auto.generate([prompt], sampling)), list(Llama(model).generate([prompt], sampling)))
    assert "--compile off" in lines[0]


def test_a_failing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("g++: not found\nand a long story")

    monkeypatch.setattr(package, "_compile", fail)
    with pytest.raises(CompileError, match=r"^the decode step cannot be compiled here \(g\+\+: not found\): use --co"):
        compile_step(tiny.model(hidden_dim=80))


def test_a_position_beyond_the_cache_is_refused(pair: Llama) -> None:
    cache = KVCache(pair.config, 1, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="position 4 does not fit: the cache holds 4 positions"):
        pair.steps.compiled[1](torch.tensor([1]), torch.tensor([4]), cache)


@pytest.mark.parametrize("words", [False, True])
@given(
    st.integers(1, 4),
    st.integers(1, 33),
    st.sampled_from([16, 48, 50]),
    st.sampled_from(["fp32", "bf16", "int8", "int4"]),
)
@settings(max_examples=60)
def test_matvec_is_the_product_with_the_dequantised_weights(words: bool, B: int, N: int, K: int, form: str) -> None:
    rng = torch.Generator().manual_seed(B * N + K)
    x, weight = torch.randn(B, K, generator=rng), torch.randn(N, K, generator=rng)
    if form in SCHEMES:
        layer = QuantLinear(weight, form, torch.float32)
        operands, weight = [layer.numbers, layer.scales], layer.weight
    else:
        operands = [weight.to(DTYPES[form])]
        weight = operands[0].float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "loads_bytes_slowly", lambda: words)  # as on processors without AVX-512
        assert in_words(operands[0]) == (words and form == "int8" and K != 50)
        torch.testing.assert_close(matvec(x, operands), x @ weight.T, rtol=1e-4, atol=1e-4)
