"""Adapters in peft, on the transformers model of the same checkpoint.

python -m pytest tests/interop/test_peft.py
"""

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import FAMILIES
from finetune.build import fresh_weights
from finetune.lora import adapter_of, add_lora_, add_rows_, lora_parameters, merged_weights, wear_
from nanollama.checkpoint import write_hf
from nanollama.checkpoint.adapter import LINEARS, merged, read_adapter, write_adapter
from nanollama.checkpoint.names import hf_name, is_rotary, to_meta_rows
from nanollama.checkpoint.peft_config import IDLE, PLAIN, read_config
from nanollama.model import ModelConfig, Transformer

peft = pytest.importorskip("peft", reason="peft is in the extra interop: pip install 'llama-parity[interop]'")
# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.arange(2, 32).unsqueeze(0)


KINDS: dict[str, dict[str, Any]] = {"plain": {"rows": ()}, "rows": {"rows": (5, 9)}, "dora": {"rows": (), "dora": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_adapter_with_the_same_logits(tmp_path: Path, family: str, kind: str) -> None:
    """Errors against float64: peft's may be at most twice that of the merged model, both ways (G3)."""
    from transformers import AutoModelForCausalLM

    config, rows = FAMILIES[family], KINDS[kind]["rows"]
    weights = fresh_weights(config, torch.Generator().manual_seed(1))
    model, generator = Transformer.from_weights(config, weights), torch.Generator().manual_seed(0)
    add_lora_(model, 4, 8.0, LINEARS, 0.0, generator, dora=kind == "dora")
    if rows:
        add_rows_(model, rows)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            drawn = torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator)
            parameter.copy_(parameter + drawn if name.endswith("lora_magnitude") else drawn)
    write_hf(tmp_path / "base", config, weights)
    write_adapter(tmp_path / "adapter", adapter_of(model), config, base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs_model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    exact_model = Transformer.from_weights(config, {n: w.double() for n, w in merged_weights(model).items()})
    with torch.inference_mode():
        ours, theirs = model.eval()(TOKENS).double(), theirs_model(TOKENS).logits.double()
        exact, plain = exact_model(TOKENS).double(), Transformer.from_weights(config, weights)(TOKENS).double()
    noise = (ours - exact).abs().max()
    assert (theirs - exact).abs().max() <= 2 * noise
    assert (plain - exact).abs().max() > 1000 * noise  # without the adapter it is another model


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_have_pefts_gradients(tmp_path: Path, dora: bool) -> None:
    """Of A, B and, under DoRA, the lengths of rows: whose norm is detached, as peft's is."""
    config = FAMILIES["llama3.1"]
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": dora}
    theirs, weights = of_peft(tmp_path, config, settings)
    ours = Transformer.from_weights(config, weights)
    wear_(ours, read_adapter(tmp_path / "adapter", config), 0.0, torch.Generator())
    losses = []
    for logits in (theirs(TOKENS).logits, ours(TOKENS)):
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:]))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    found = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    seen = 0
    for name, parameter in lora_parameters(ours).items():
        layer, _, kind = name.rpartition(".")
        peft_name = hf_name(f"{layer}.weight").removesuffix(".weight")
        part = "lora_magnitude_vector" if kind == "lora_magnitude" else kind
        grad = found[f"base_model.model.{peft_name}.{part}.default.weight"]
        if is_rotary(f"{layer}.weight") and kind != "lora_A":
            grad = to_meta_rows(grad, config.head_dim)
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
        seen += 1
    assert seen == len(found) == (9 if dora else 6) * config.n_layers


def of_peft(tmp_path: Path, config: ModelConfig, settings: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """peft's model with all that it trains away from zero, saved in tmp_path/adapter; and the weights of its base."""
    from transformers import AutoModelForCausalLM

    weights = fresh_weights(config, torch.Generator().manual_seed(1))
    write_hf(tmp_path / "base", config, weights)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                change = torch.empty_like(parameter).uniform_(
                    -0.3, 0.3, generator=torch.Generator().manual_seed(len(name))
                )
                parameter.add_(change)
    model.save_pretrained(tmp_path / "adapter")
    return model, weights


SOME = ["q_proj", "k_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": SOME},
    "llama's own": {},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "0.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.1\.self_attn\.(q|o)_proj", "init_lora_weights": False},
    "layers": {"target_modules": SOME, "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": SOME, "exclude_modules": r".*\.0\..*q_proj"},
    "patterns": {"target_modules": SOME, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}},
    "rslora": {
        "target_modules": SOME,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"q_proj": 2},
    },
    "dora": {"target_modules": SOME, "use_dora": True, "rank_pattern": {"q_proj": 2}},
    "gaussian": {"target_modules": SOME, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}
UNTIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole": {"target_modules": SOME, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "rows": {"target_modules": SOME, "trainable_token_indices": [9, 5]},
    "rows of both": {"target_modules": SOME, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [9, 7]}},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    ("family", "variant"), [*product(FAMILIES, VARIANTS), *product(["llama3.1"], UNTIED), ("llama3.2", "rows")]
)
def test_we_read_pefts_adapter_with_the_same_logits(tmp_path: Path, family: str, variant: str) -> None:
    config = FAMILIES[family]
    theirs_model, weights = of_peft(tmp_path, config, (VARIANTS | UNTIED)[variant])
    adapter = read_adapter(tmp_path / "adapter", config)
    with torch.inference_mode():
        theirs = theirs_model(TOKENS).logits
        ours = Transformer.from_weights(config, merged(weights, adapter))(TOKENS)
        plain = Transformer.from_weights(config, weights)(TOKENS)
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().clamp(min=1))
    assert not torch.allclose(plain, theirs, atol=0.1)


@pytest.mark.parametrize(
    "settings",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "mica"}],
    ids=str,
)
def test_kinds_that_change_formula_or_base_are_refused_as_peft_writes_them(tmp_path: Path, settings: dict) -> None:
    of_peft(tmp_path, FAMILIES["llama3.1"], {"target_modules": SOME, **settings})
    with pytest.raises(ValueError, match=next(iter(settings))):
        read_adapter(tmp_path / "adapter", FAMILIES["llama3.1"])


READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
}
READ |= {"layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices"}
REFUSED = {"fan_in_fan_out", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
REFUSED |= {"velora_config", "kasa_config", "alora_invocation_tokens", "use_qalora", "monteclora_config"}
REFUSED |= {"layer_replication", "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "ensure_weight_tying"}


def test_every_setting_of_this_peft_is_read_or_idle_or_refused(tmp_path: Path) -> None:
    """A field of a new release fails here: say what it does to formula and base, then put it where it belongs."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert not fields - {*PLAIN, *IDLE, *READ, *REFUSED}
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    assert read_config(write_json(tmp_path, plain)).rank == 4
    for field in REFUSED:
        with pytest.raises(ValueError, match=field):
            read_config(write_json(tmp_path, {**plain, field: True}))


def write_json(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "adapter_config.json"


def test_peft_finds_the_base_that_our_adapter_names(tmp_path: Path) -> None:
    config = FAMILIES["llama3.1"]
    model = Transformer.from_weights(config, fresh_weights(config, torch.Generator().manual_seed(1)))
    write_hf(tmp_path / "base", config, merged_weights(model))
    add_lora_(model, 4, 8.0, LINEARS, 0.0, torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", adapter_of(model), config, base=str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(theirs.eval()(TOKENS).logits, model.eval()(TOKENS), atol=1e-5)
