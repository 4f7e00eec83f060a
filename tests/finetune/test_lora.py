"""LoRA: what is trained, what a merge makes, what a saved adapter holds, and what is refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from checkpoint_cases import FAMILIES, LLAMA31, LLAMA32
from finetune.build import fresh_weights
from finetune.config import TrainConfig, lora_targets
from finetune.lora import (
    LoraLinear,
    adapter_of,
    add_lora_,
    add_rows_,
    lora_parameters,
    merged_model,
    merged_weights,
    quantize_base_,
    wear_,
)
from finetune.optim import make_optimizer, select_trained_
from nanollama.checkpoint import CheckpointError
from nanollama.checkpoint.adapter import CONFIG, LINEARS, TENSORS, merged, read_adapter, write_adapter
from nanollama.model import ModelConfig, Transformer

TOKENS = torch.arange(2, 32).unsqueeze(0)
ROWS = (5, 9)


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    return fresh_weights(config, torch.Generator().manual_seed(1))


def tuned(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    targets: tuple[str, ...] = LINEARS,
    rows: tuple = (),
    dora: bool = False,
) -> Transformer:
    """A model with an adapter whose numbers are all away from zero, as after training."""
    model = Transformer.from_weights(config, weights_of(config), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    add_lora_(model, 4, 8.0, targets, 0.0, generator, dora=dora)
    if rows:
        add_rows_(model, rows)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            least = 0.5 if name.endswith("lora_magnitude") else -0.3
            parameter.uniform_(least, least + 0.6, generator=generator)
    return model.eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).double()


def in_float64(model: Transformer) -> Tensor:
    """The logits of base and adapter summed and run in float64."""
    weights = {name: weight.double() for name, weight in merged_weights(model).items()}
    for name, (a, b) in adapter_of(model).pairs.items():
        base = model.get_submodule(name.removesuffix(".weight")).base.weight
        weights[name] = base.detach().double() + 2 * b.double() @ a.double()  # alpha 8 / rank 4
        if name in adapter_of(model).magnitudes:
            length = adapter_of(model).magnitudes[name].double() / weights[name].norm(dim=1)
            weights[name] = weights[name] * length.unsqueeze(1)
    return logits(Transformer.from_weights(model.config, weights))


def within_noise(found: Tensor, same: Tensor, exact: Tensor) -> bool:
    """G3: the root mean square error of `found` is at most twice that of another way to the same numbers."""
    return bool((found - exact).norm() <= 2 * (same - exact).norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_unmerged_within_the_noise(family: str, dtype: torch.dtype, dora: bool) -> None:
    config = FAMILIES[family]
    model = tuned(config, dtype, rows=ROWS, dora=dora)
    exact = in_float64(model)
    plain = merged_model(model)
    unmerged, merged_too = logits(model), logits(plain)
    assert not lora_parameters(plain)
    assert within_noise(merged_too, unmerged, exact)
    assert within_noise(unmerged, merged_too, exact)
    base = Transformer.from_weights(config, weights_of(config), dtype=dtype)
    assert not within_noise(logits(base), unmerged, exact)
    plain.layers[1].attention.wq.weight.data *= 1 + 256 * torch.finfo(dtype).eps
    assert not within_noise(logits(plain), unmerged, exact)


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(dora: bool) -> None:
    config = TrainConfig(method="lora", lr=0.1, weight_decay=0.0)
    base, model = (Transformer.from_weights(LLAMA31, weights_of(LLAMA31)) for _ in range(2))
    add_lora_(model, 4, 8.0, ("wq", "w2"), 0.0, torch.Generator().manual_seed(0), dora=dora)
    add_rows_(model, ROWS)
    assert all(m.is_idle() for m in model.modules() if isinstance(m, LoraLinear))
    select_trained_(model, config.method)
    assert torch.equal(logits(model), logits(base))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    names = set(lora_parameters(model))
    assert {id(p) for p in optimizer.state} == {id(p) for p in lora_parameters(model).values()}
    assert {"output.token_rows", "tok_embeddings.token_rows", "layers.1.attention.wq.lora_B"} <= names
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= names
    assert any(name.endswith("lora_magnitude") for name in names) == dora
    assert {name for name in names if not name.endswith("lora_A")} <= moved  # A has no gradient while B is zero


@pytest.mark.parametrize("config", [LLAMA31, LLAMA32], ids=["untied", "tied"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_comes_back_as_it_was_written(tmp_path: Path, config: ModelConfig, dora: bool) -> None:
    model = tuned(config, targets=("wq", "wk", "w2"), rows=ROWS, dora=dora)
    write_adapter(tmp_path / "a", adapter_of(model), config, base="base")
    adapter = read_adapter(tmp_path / "a", config)
    assert (adapter.targets, set(adapter.ranks.values()), set(adapter.alphas.values())) == (
        ("wq", "wk", "w2"),
        {4},
        {8},
    )
    assert {ids for ids, _ in adapter.rows.values()} == {ROWS}
    weights = merged(weights_of(config), adapter)
    for name, weight in merged_weights(model).items():
        assert torch.equal(weights[name], weight), name
        assert torch.allclose(weights.rows(name, 3, 7), weight[3:7], atol=1e-6)
    other = Transformer.from_weights(config, weights_of(config))
    wear_(other, adapter, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(logits(other), logits(model))
    assert {name for name, p in other.named_parameters() if p.requires_grad} == set(lora_parameters(other))


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    weights = weights_of(LLAMA31)
    weights["layers.0.attention.wv.weight"][3] = 0
    model = Transformer.from_weights(LLAMA31, weights)
    add_lora_(model, 4, 8.0, ("wv",), 0.0, torch.Generator().manual_seed(0), dora=True)
    assert torch.equal(logits(model), logits(Transformer.from_weights(LLAMA31, weights)))
    assert torch.equal(merged_weights(model)["layers.0.attention.wv.weight"], weights["layers.0.attention.wv.weight"])


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_flow_through_an_adapted_head(dora: bool) -> None:
    model = tuned(LLAMA31, targets=("output",), dora=dora)
    model(TOKENS).square().sum().backward()
    layer = model.output
    assert layer.lora_A.grad.abs().sum() > 0
    assert layer.lora_B.grad.abs().sum() > 0


def test_dropout_acts_while_training_only() -> None:
    model = Transformer.from_weights(LLAMA31, weights_of(LLAMA31))
    add_lora_(model, 4, 8.0, ("wv",), 0.5, torch.Generator().manual_seed(0))
    for name, parameter in lora_parameters(model).items():
        parameter.data.fill_(0.1 if name.endswith("lora_B") else 0.2)
    assert torch.equal(logits(model.eval()), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


@pytest.mark.parametrize(
    ("targets", "found"),
    [("all", LINEARS), ("attention,w2", ("wq", "wk", "wv", "wo", "w2")), ("output, wq", ("output", "wq"))],
)
def test_targets_are_groups_and_names(targets: str, found: tuple[str, ...]) -> None:
    assert lora_targets(TrainConfig(lora_targets=targets)) == found


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (LLAMA31, ("wq", "w9"), "lora target w9: expected all, attention, or some of wq"),
        (LLAMA32, ("output",), "the head is tied"),
    ],
)
def test_targets_that_are_not_there_are_refused(config: ModelConfig, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(config, targets=targets)


def test_an_adapted_head_and_chat_rows_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="leave output out of the targets"):
        tuned(LLAMA31, targets=("output",), rows=ROWS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", adapter_of(tuned(LLAMA31, rows=ROWS)), LLAMA31, base="base")
    return tmp_path / "a"


def edit_config(folder: Path, **changes: object) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **changes}))


def drop_tensor(folder: Path, part: str) -> None:
    kept = {n: t for n, t in safetensors.torch.load_file(folder / TENSORS).items() if part not in n}
    safetensors.torch.save_file(kept, folder / TENSORS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json beside its tensors: copy that file too"),
        (lambda f: shutil.rmtree(f), "does not exist: expected the folder of an adapter"),
        (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
        (lambda f: (f / TENSORS).write_bytes(b"no"), "cannot be read"),
        (lambda f: (f / TENSORS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
        (lambda f: (f / TENSORS).unlink(), "holds neither adapter_model.safetensors nor adapter_model.bin"),
        (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "is truncated or not a .pth file"),
        (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda f: edit_config(f, use_dora=True), "lora_magnitude_vector is missing"),
        (lambda f: edit_config(f, bias="all"), "bias is 'all'"),
        (lambda f: edit_config(f, r=5), "lora_A.weight has shape"),
        (lambda f: edit_config(f, r="4"), "r is '4'"),
        (lambda f: edit_config(f, trainable_token_indices=None), "token_adapter"),
        (
            lambda f: edit_config(f, trainable_token_indices={"embed_tokens": [5, 96], "lm_head": [5, 9]}),
            "ids below 96",
        ),
        (
            lambda f: drop_tensor(f, "layers.1.self_attn.q_proj"),
            "model.layers.1.self_attn.q_proj.lora_A.weight is missing",
        ),
        (lambda f: drop_tensor(f, "layers.1.self_attn.q_proj.lora_B"), "lora_B.weight is missing"),
        (lambda f: drop_tensor(f, "lora"), "lora_A.weight is missing: the adapter is incomplete"),
        (lambda f: drop_tensor(f, "lm_head"), "lm_head.token_adapter.trainable_tokens_delta is missing"),
    ],
)
def test_a_wrong_adapter_is_one_line(saved: Path, damage: object, message: str) -> None:
    damage(saved)  # type: ignore[operator]
    with pytest.raises(CheckpointError) as caught:
        read_adapter(saved, LLAMA31)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_shape_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="it belongs to another base"):
        read_adapter(saved, replace(LLAMA31, hidden_dim=128))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["torchao", *(name for name in sys.modules if name.startswith("torchao."))]:  # some tests import it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'llama-parity\[lean\]'"):
        quantize_base_(Transformer.from_weights(LLAMA31, weights_of(LLAMA31)))
