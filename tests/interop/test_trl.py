"""Losses on pairs in trl's own trainer, on the transformers model of the same checkpoint.

python -m pytest tests/interop/test_trl.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from finetune.config import TrainConfig
from finetune.data.dialogs import joined
from finetune.data.pairs import PairPacker, Pairs
from finetune.pairwise import PairLossModel, sequence_log_probs
from finetune.parallelize import World
from finetune.reference import make_reference
from finetune.train import accumulate_
from nanollama.checkpoint import write_hf
from nanollama.model import Transformer

trl = pytest.importorskip("trl", reason="trl is in the extra interop: pip install 'llama-parity[interop]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of trl, accelerate and datasets
CPU, FP32, BETA = World(torch.device("cpu")), torch.autocast("cpu", enabled=False), 0.3
NAMES = {  # whose rows lie alike in both layouts
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.0.self_attn.v_proj.weight": "layers.0.attention.wv.weight",
    "model.layers.0.self_attn.o_proj.weight": "layers.0.attention.wo.weight",
    "model.layers.1.mlp.gate_proj.weight": "layers.1.feed_forward.w1.weight",
    "model.layers.1.mlp.down_proj.weight": "layers.1.feed_forward.w2.weight",
    "model.layers.1.input_layernorm.weight": "layers.1.attention_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def examples() -> list[dict[str, list[int]]]:
    """Prompts and answers of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 61, (n,), generator=generator).tolist()
    sizes = ((4, 9, 3), (7, 2, 12), (2, 5, 5))
    return [{"prompt_ids": [1, *draw(p)], "chosen_ids": draw(c), "rejected_ids": draw(r)} for p, c, r in sizes]


def policy() -> Transformer:
    """The reference a little further on."""
    model, generator = tiny.model(61), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def ours(kind: str, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    sequences = []
    for example in examples():
        for side in ("chosen_ids", "rejected_ids"):
            prompt = example["prompt_ids"]
            ids = np.array(prompt + example[side])
            sequences.append((ids, np.arange(len(ids)) >= len(prompt)))
    pairs = Pairs(joined(sequences, 1))
    config = TrainConfig(seq_len=100, batch_size=1)
    made = make_reference(tiny.model(61).to(dtype), (pairs, pairs), sequence_log_probs, config, CPU, FP32)
    packer = PairPacker(Pairs(pairs.sequences, made["train"]), 100)
    model = policy().to(dtype).train()
    batches = [packer.batch([[0, 1, 2]])]
    loss = float(accumulate_(PairLossModel(model, kind, BETA), batches, 3, FP32, CPU)) / 3
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def theirs(kind: str, folder: Path) -> tuple[float, dict[str, Tensor]]:
    """What DPOTrainer makes of the same ids."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    def as_hf(model: Transformer, name: str) -> Any:
        write_hf(folder / name, model.config, dict(model.state_dict()))
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    words = Tokenizer(WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    trainer = trl.DPOTrainer(
        model=as_hf(policy(), "policy"),
        ref_model=as_hf(tiny.model(61), "base"),
        args=trl.DPOConfig(
            str(folder / "run"), beta=BETA, loss_type=[kind], report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"),
    )  # fmt: skip
    loss = trainer.compute_loss(trainer.model, DataCollatorForPreference(0)(examples()))
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), {mine: grads[name] for name, mine in NAMES.items()}


@pytest.mark.parametrize(("kind", "name"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("dpo_norm", "sigmoid_norm")])
def test_loss_and_gradients_are_trls_within_g8(kind: str, name: str, tmp_path: Path) -> None:
    """Errors against our own code in float64: ours at most three times trl's."""
    exact, mine, other = ours(kind, torch.float64), ours(kind, torch.float32), theirs(name, tmp_path)
    assert other[0] == pytest.approx(exact[0], rel=1e-4)
    assert mine[0] == pytest.approx(exact[0], rel=1e-4)
    for weight, grad in other[1].items():
        wanted = exact[1][weight]
        size = float(wanted.square().mean().sqrt())
        off = [float((g.double() - wanted).square().mean().sqrt()) for g in (mine[1][weight], grad)]
        assert off[1] <= 1e-3 * size, weight  # they compute the same thing
        assert off[0] <= 3 * max(off[1], 6e-8 * size / 2), weight
