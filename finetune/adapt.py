"""What a run puts on the model between its weights and the loop: mean rows for chat words, a 4-bit base, adapters.

The order matters: rows are filled before they are copied into a table of their own, and layers become 4-bit before
adapters go around them. All of it follows from the config and the checkpoint, so a resumed run builds the same.
"""

from collections.abc import Callable
from typing import Any

import torch

from finetune.config import LORA_METHODS, TrainConfig, lora_targets
from finetune.lora import add_lora_, add_rows_, wear_
from finetune.nf4 import quantize_base_
from nanollama.checkpoint.adapter import Adapter, read_adapter
from nanollama.model import Transformer
from nanollama.tokenizer import Tokenizer

# Of Llama 3's format; where the checkpoint has a template of its own, the special tokens that it names.
CHAT_WORDS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
UNTRAINED_NORM = 0.1  # of the median row's: shorter rows were never pulled away from zero


def adapt_(model: Transformer, config: TrainConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Everything that the config says of adapters and chat rows. Raises ValueError."""
    adapter = read_adapter(config.adapter, model.config) if config.adapter else None
    ids = chat_rows(model, tokenizer, config.chat_rows)
    if ids:
        if config.method in ("norms", "no_embeddings"):
            raise ValueError(
                f"--method {config.method} does not train the chat words, and their rows are untrained: choose "
                "--method full or lora, or --chat_rows keep"
            )
        reset_rows_(model, ids, ordinary_words(tokenizer, model))
        words = ", ".join(name for name, i in sorted(tokenizer.special_ids.items()) if i in ids)
        say(f"chat: the rows of {words} start from the mean of the trained ones, and are trained")
    if config.method in LORA_METHODS:
        _wrap_(model, config, adapter, ids)


def _wrap_(model: Transformer, config: TrainConfig, adapter: Adapter | None, ids: tuple[int, ...]) -> None:
    if config.method == "qlora":
        quantize_base_(model)
    generator = torch.Generator().manual_seed(config.seed)
    if adapter:
        _refuse_other_shape(config, adapter)
        wear_(model, adapter, config.lora_dropout, generator)
    else:
        rank, alpha, targets = config.lora_rank, config.lora_alpha, lora_targets(config)
        add_lora_(model, rank, alpha, targets, config.lora_dropout, generator)
    if ids and not (adapter and adapter.rows):
        add_rows_(model, ids)


def _refuse_other_shape(config: TrainConfig, adapter: Adapter) -> None:
    """A flag that has its default value counts as not given; one that was given must be the adapter's."""
    saved: dict[str, set[Any]] = {
        "rank": set(adapter.ranks.values()),
        "alpha": set(adapter.alphas.values()),
        "targets": set(adapter.targets),
    }
    given, usual = _shape(config), _shape(TrainConfig())
    for name, theirs in saved.items():
        if given[name] not in (usual[name], theirs):
            shown = ",".join(map(str, sorted(theirs)))
            raise ValueError(f"--adapter {config.adapter} has {name} {shown}: drop --lora_{name}, which says otherwise")


def _shape(config: TrainConfig) -> dict[str, set[Any]]:
    return {"rank": {config.lora_rank}, "alpha": {config.lora_alpha}, "targets": set(lora_targets(config))}


def chat_rows(model: Transformer, tokenizer: Tokenizer, choice: str) -> tuple[int, ...]:
    """Ids of the chat words whose rows are to be filled anew: none (keep), all (reinit), the untrained ones (auto).

    Untrained is a row of the embedding or head that is much shorter than the others, or equal to another chat word's.
    """
    named, template = tokenizer.special_ids.items(), tokenizer.chat_template or ""
    words = [i for name, i in named if name in CHAT_WORDS or (name in template and i != tokenizer.bos_id)]
    words = [i for i in words if i < model.config.vocab_size]
    if choice == "keep" or not words:
        return ()
    if choice == "reinit":
        return tuple(sorted(words))
    found = set()
    ordinary = ordinary_words(tokenizer, model)
    for matrix in _matrices(model):
        sample = matrix[ordinary[::16]].float()
        least = UNTRAINED_NORM * sample.norm(dim=1).median()
        rows = {i: matrix[i].float() for i in words}
        for i, row in rows.items():
            if row.norm() < least or any(torch.equal(row, other) for j, other in rows.items() if j != i):
                found.add(i)
    return tuple(sorted(found))


def ordinary_words(tokenizer: Tokenizer, model: Transformer) -> list[int]:
    """Ids of the words that are no specials, and have rows."""
    special = set(tokenizer.special_ids.values())
    return [i for i in range(min(tokenizer.vocab_size, model.config.vocab_size)) if i not in special]


@torch.no_grad()
def reset_rows_(model: Transformer, ids: tuple[int, ...], ordinary: list[int]) -> None:
    """Rows `ids` of embedding and head become the mean of the ordinary words' rows."""
    for matrix in _matrices(model):
        matrix[list(ids)] = matrix[ordinary].mean(dim=0)


def _matrices(model: Transformer) -> list[torch.Tensor]:
    head = [] if model.output is None else [model.output.weight]
    return [model.tok_embeddings.weight, *head]
