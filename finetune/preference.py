"""Teach a checkpoint which of two answers is the better one: DPO, IPO, length-normalised DPO, ORPO.

python -m finetune.preference --data pairs.jsonl --ckpt Llama-3.2-1B-Instruct --method lora
python -m finetune.preference --data pairs.jsonl --ckpt Llama-3.2-1B-Instruct --loss orpo

A line is {"prompt", "chosen", "rejected"}: texts, lists of messages, or whole dialogues without a prompt
(finetune/data/pairs.py). The reference is the model as the run begins: what it says of the answers is computed once and
kept in the cache. `metrics.jsonl` has margin, accuracy and both rewards of each step, and val_kl, the divergence to the
reference, at each validation.
"""

from dataclasses import replace
from pathlib import Path

from finetune.build import mixed_precision
from finetune.config import LORA_METHODS, TrainConfig
from finetune.data.files import Say
from finetune.data.pairs import Pairs, read_pairs
from finetune.data.rows import is_hub_id
from finetune.errors import UserError
from finetune.optim import select_trained_
from finetune.pairwise import Pairwise, sequence_log_probs
from finetune.prepare.cache import Prepared, cache_folder
from finetune.prepare.shards import Vocabulary
from finetune.reference import open_reference
from finetune.run import Entry, run_entry
from finetune.train import Setup
from nanollama.chat import template_source
from nanollama.tokenizer import open_tokenizer

KINDS = "a .jsonl, .json or .parquet file of pairs, a folder of them, or a data set of the hub (owner/name)"
BETA = {"dpo": 0.1, "ipo": 0.1, "dpo_norm": 5.0, "orpo": 0.1}  # of the papers' recipes
RATE = {"full": 1e-6, "adapter": 2e-5}  # peak learning rates; ORPO learns the answers as well, eight times as fast
ORPO_FASTER = 8


def recipe(config: TrainConfig) -> TrainConfig:
    """Rate and beta that suit the loss, where they are left open. Raises UserError."""
    if config.doc_mask == "off":
        raise UserError("--doc_mask off: the rejected answer would read the chosen one: leave the flag out")
    rate = RATE["adapter" if config.method in LORA_METHODS else "full"]
    rate *= ORPO_FASTER if config.loss == "orpo" else 1
    return replace(config, lr=config.lr or rate, beta=config.beta or BETA[config.loss])


def find(config: TrainConfig, cache: Path, say: Say) -> Path:
    """What `--data` names, which has to be given."""
    if config.data == "auto":
        raise UserError(f"--data is missing: name {KINDS}")
    if not Path(config.data).exists() and not is_hub_id(config.data):
        raise UserError(f"--data {config.data}: no such file or folder: name {KINDS}")
    if config.val_data:
        raise UserError("--val_data: finetune.preference holds pairs of --data out: leave the flag out")
    if not config.ckpt:
        raise UserError("--ckpt is missing: name the checkpoint that learns what is preferred")
    return Path(config.data)


def make(config: TrainConfig, tokenizer: Path, say: Say) -> Prepared:
    """The pairs as documents. Raises UserError that names the line."""
    path, opened = Path(config.data), open_tokenizer(tokenizer)
    say(f"chat format: {template_source(opened)}")
    train, val = read_pairs(path, opened, config.seq_len, on_bad=config.on_bad, say=say)
    if len(val.lengths) == len(train.lengths):
        say(f"data: only {len(train.lengths)} pairs: none is held out, validation is on the same")
    return Prepared(path.stem, tokenizer, Vocabulary.of(tokenizer), train, val)


def ready(setup: Setup, say: Say) -> Setup:
    """The objective, and what the reference says of every pair."""
    config, train, val = setup.folder.config, setup.train, setup.val
    assert isinstance(train, Pairs) and isinstance(val, Pairs)
    if setup.world.mesh:
        raise UserError(f"{setup.world.sizes}: pairs are trained on by whole copies of the model: use --dp alone")
    if config.loss == "orpo":
        return replace(setup, objective=Pairwise(config.loss, config.beta))
    select_trained_(setup.model, config.method)  # whether the head is trained decides if a copy of it is kept
    autocast = mixed_precision(config, setup.world.device)
    reference = open_reference(
        setup.model,
        (train, val),
        sequence_log_probs,
        config,
        cache_folder(config.cache),
        setup.world,
        autocast,
        say,
    )
    return replace(
        setup,
        train=replace(train, reference=reference.train),
        val=replace(val, reference=reference.val),
        objective=Pairwise(config.loss, config.beta, reference),
    )


ENTRY = Entry(
    "preference",
    find,
    {"chat_rows": "auto", "prompt": "Hello!", "weight_decay": 0.0},
    make=make,
    talks=True,
    recipe=recipe,
    ready=ready,
)

if __name__ == "__main__":
    run_entry(ENTRY)
