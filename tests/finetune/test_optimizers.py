"""Muon beside AdamW, rsLoRA's scale, LoRA+'s rates, and the average of the weights."""

import math
from types import SimpleNamespace

import pytest
import torch

import tiny
from finetune.average import averaged, update_average_, use_average_
from finetune.build import adapt_
from finetune.config import TrainConfig
from finetune.errors import UserError
from finetune.lora import LoraLinear, add_lora_, lora_parameters, merged_weights
from finetune.muon import MuonAndAdamW
from finetune.optim import make_optimizer, select_trained_, set_learning_rate_, trained
from nanollama.model import Transformer
from parity.run.training import made_up_gradient

MUON = TrainConfig(optimizer="muon", lr=2e-3, weight_decay=0.125, ema=0.0)


def with_gradients(model: Transformer, step: int) -> None:
    for parameter in trained(model).values():
        parameter.grad = made_up_gradient(parameter, step)


def test_muon_steps_are_torchs_own_for_matrices_and_adamws_for_the_rest() -> None:
    model, plain = tiny.model(61).train(), tiny.model(61).train()
    optimizer = make_optimizer(model, MUON)
    assert isinstance(optimizer, MuonAndAdamW)
    matrices = {n: p for n, p in trained(plain).items() if p.ndim == 2 and n.startswith("layers")}
    tables = [p for n, p in trained(plain).items() if p.ndim == 2 and n not in matrices]
    norms = [p for p in trained(plain).values() if p.ndim == 1]
    settings = {"lr": MUON.lr, "betas": (MUON.beta1, MUON.beta2), "eps": MUON.eps, "fused": True}
    theirs = [
        torch.optim.Muon(
            list(matrices.values()), lr=MUON.lr, weight_decay=0.125, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.125}, {"params": norms, "weight_decay": 0}], **settings
        ),
    ]
    for step in range(3):
        with_gradients(model, step)
        with_gradients(plain, step)
        optimizer.step()
        for part in theirs:
            part.step()
    wanted = dict(plain.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())
    states = {n: set(optimizer.state[p]) for n, p in trained(model).items()}
    assert states["layers.0.attention.wq.weight"] == {"momentum_buffer"}
    assert states["norm.weight"] == states["output.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    model = tiny.model(61)
    add_lora_(model, 4, 8.0, ("wq",), 0.0, torch.Generator().manual_seed(0))
    select_trained_(model, "lora")
    optimizer = make_optimizer(model, TrainConfig(method="lora", ckpt="x", lora_plus=16.0, lr=1e-3))
    set_learning_rate_(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in lora_parameters(model).items():
        assert rates[id(parameter)] == pytest.approx(1.6e-2 if name.endswith("lora_B") else 1e-3)
    assert len(rates) == len(lora_parameters(model))


def test_rslora_scales_by_the_root_of_the_rank_and_merges_so() -> None:
    model = tiny.model(61)
    base = model.layers[0].attention.wq.weight.detach().clone()
    config = TrainConfig(method="lora", ckpt="x", lora_rank=4, lora_alpha=8.0, lora_scale="sqrt")
    words = SimpleNamespace(special_ids={}, chat_template=None, bos_id=None)
    adapt_(model, config, words, print)  # type: ignore[arg-type]  # of a tokenizer nothing else is looked at
    layer = model.layers[0].attention.wq
    assert isinstance(layer, LoraLinear)
    assert layer.scale == pytest.approx(8 / math.sqrt(4))
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    wanted = base.double() + 8 / math.sqrt(4) * layer.lora_B.double() @ layer.lora_A.double()
    merged = merged_weights(model)["layers.0.attention.wq.weight"]  # in fp32
    torch.testing.assert_close(merged, wanted.float(), rtol=1e-5, atol=1e-6)


def test_the_average_is_the_textbooks_and_the_weights_come_back() -> None:
    model = tiny.model(61).train()
    optimizer, parameters = make_optimizer(model, TrainConfig(lr=1e-2)), list(trained(model).values())
    wanted: list[torch.Tensor] = []
    for step in range(4):
        with_gradients(model, step)
        optimizer.step()
        update_average_(optimizer, parameters, 0.75)
        now = [p.detach().clone() for p in parameters]
        wanted = [0.75 * a + 0.25 * b for a, b in zip(wanted, now, strict=True)] if wanted else now
    with averaged(optimizer, parameters):
        torch.testing.assert_close([p.detach() for p in parameters], wanted)
    assert all(torch.equal(p, b) for p, b in zip(parameters, now, strict=True))
    use_average_(optimizer, parameters)
    torch.testing.assert_close([p.detach() for p in parameters], wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "muon", "weights": "bf16"}, "--optimizer muon has no stochastic rounding"),
        ({"ema": 0.9, "optimizer_in_backward": True, "grad_clip": 0.0}, "--optimizer_in_backward goes neither with"),
        ({"lora_scale": "sqrt"}, "--lora_scale goes with --method lora or qlora"),
        ({"lora_plus": 0.0}, "--lora_plus 0.0: expected a multiple above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)
