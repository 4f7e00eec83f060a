"""The chunked loss is the plain one: value, gradients, whatever is frozen, in fp64 exactly and in fp32 within noise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune import loss as loss_module
from finetune.loss import IGNORE, linear_cross_entropy, plain_cross_entropy


def drawn(n: int, vocab: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < 0.3] = IGNORE
    return hidden, head, labels


def run(fn, hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
    hidden.grad = head.grad = None
    value = fn(hidden, head, labels)
    (value / 7).backward()
    return value.detach(), hidden.grad, head.grad


@settings(max_examples=30)
@given(n=st.integers(1, 300), vocab=st.integers(2, 400), seed=st.integers(0, 99))
def test_float64_equals_the_plain_loss(n: int, vocab: int, seed: int) -> None:
    hidden, head, labels = drawn(n, vocab, 6, torch.float64, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS", 1)  # chunks of MIN_CHUNK_TOKENS
        got, wanted = (run(fn, hidden, head, labels) for fn in (linear_cross_entropy, plain_cross_entropy))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_second_backward_pass_is_refused() -> None:
    value = linear_cross_entropy(*drawn(5, 7, 3, torch.float64))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        value.backward()


@pytest.mark.parametrize("kind", ["fp32", "autocast", "bf16"])
def test_error_is_the_plain_losss_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 of the same numbers, at most twice what the plain loss is off by, in many chunks."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 1)
    given = [t.detach() for t in drawn(4000, 1000, 64, torch.float32)]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    hidden, head, labels = given[0].to(dtype), given[1].to(dtype), given[2]
    exact = run(plain_cross_entropy, hidden.double().requires_grad_(), head.double().requires_grad_(), labels)
    errors = {}
    for fn in (linear_cross_entropy, plain_cross_entropy):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
            found = run(fn, hidden.requires_grad_(), head.requires_grad_(), labels)
        errors[fn] = [float((a.double() - b).square().mean().sqrt()) for a, b in zip(found, exact, strict=True)]  # type: ignore[union-attr]
    for mine, plain in list(zip(errors[linear_cross_entropy], errors[plain_cross_entropy], strict=True))[1:]:
        assert mine <= 2 * plain
    assert errors[linear_cross_entropy][0] <= (3e-7 if kind == "fp32" else 4e-3) * float(exact[0])


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_gets_no_gradient(frozen: str) -> None:
    hidden, head, labels = drawn(50, 30, 8, torch.float64)
    wanted = run(plain_cross_entropy, hidden, head, labels)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    got = run(linear_cross_entropy, hidden, head, labels)
    assert (got[1] is None, got[2] is None) == (frozen == "hidden", frozen == "head")
    for a, b in zip(got, wanted, strict=True):
        assert a is None or torch.allclose(a, b, rtol=1e-11)  # type: ignore[arg-type]


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    hidden, head, labels = drawn(4, 9, 3, torch.float32)
    value, grad_hidden, grad_head = run(linear_cross_entropy, hidden, head, torch.full_like(labels, IGNORE))
    assert float(value) == 0 and not grad_hidden.any() and not grad_head.any()  # type: ignore[union-attr]


def test_no_tensor_of_all_logits_exists() -> None:
    """The largest tensor that the forward pass makes is a chunk, and none as large is kept for the backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    hidden, head, labels = drawn(1024, 4096, 8, torch.float32)
    with pytest.MonkeyPatch.context() as patch, Sizes():
        patch.setattr(loss_module, "CHUNK_LOGITS", 64 * 4096)
        linear_cross_entropy(hidden, head, labels).backward()
    assert max(sizes) == 64 * 4096
