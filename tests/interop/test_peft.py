"""Adapters in peft, on the transformers model of the same checkpoint.

python -m pytest tests/interop/test_peft.py
"""

from pathlib import Path

import pytest
import torch

from checkpoint_cases import FAMILIES
from finetune.lora import adapter_of, add_lora_, add_rows_, lora_parameters, merged_weights
from finetune.start import fresh_weights
from nanollama.adapter import LINEARS, merged, read_adapter, write_adapter
from nanollama.checkpoint import write_hf
from nanollama.model import Transformer

peft = pytest.importorskip("peft", reason="peft is in the extra interop: pip install 'nanollama[interop]'")
# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.arange(2, 32).unsqueeze(0)


@pytest.mark.parametrize("rows", [(), (5, 9)], ids=["plain", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_adapter_with_the_same_logits(tmp_path: Path, family: str, rows: tuple[int, ...]) -> None:
    """Errors against float64: peft's may be at most twice that of the merged model, both ways (G3)."""
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]
    weights = fresh_weights(config, torch.Generator().manual_seed(1))
    model, generator = Transformer.from_weights(config, weights), torch.Generator().manual_seed(0)
    add_lora_(model, 4, 8.0, LINEARS, 0.0, generator)
    if rows:
        add_rows_(model, rows)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.uniform_(-0.3, 0.3, generator=generator)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_pefts_adapter_with_the_same_logits(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]
    weights = fresh_weights(config, torch.Generator().manual_seed(1))
    write_hf(tmp_path / "base", config, weights)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"])
    theirs_model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs_model.named_parameters():
            if "lora_" in name:
                parameter.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs_model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", config)
    with torch.inference_mode():
        theirs = theirs_model(TOKENS).logits
        ours = Transformer.from_weights(config, merged(weights, adapter))(TOKENS)
        plain = Transformer.from_weights(config, weights)(TOKENS)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(plain, theirs, atol=0.1)
