"""Ten vocabularies as people have them, each a tiny Hugging Face or Meta folder: what makers of Llamas ship.

Cut from the real Llama 3 and Llama 2 files, so that a checkpoint takes kilobytes; names, flags and templates are the
makers'.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint_cases import make_weights
from nanollama.checkpoint import write_hf, write_meta
from nanollama.model import ModelConfig
from nanollama.vocabulary import read

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' if m['role'] == 'user' else '<｜Assistant｜>' }}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def config_of(rows: int) -> ModelConfig:
    return ModelConfig(8, 1, 2, 1, rows, 8, rope_theta=10_000.0, tied=True)


def folder_of(folder: Path, rows: int, tokenizer: Path | None, format: str = "hf") -> Path:
    config = config_of(rows)
    writer = write_hf if format == "hf" else write_meta
    writer(folder, config, make_weights(config, torch.float32), tokenizer=tokenizer)
    return folder


def llama3(folder: Path, sources: Callable[[str], Path], tokens: int = 2000) -> Path:
    """Meta's folder; the first of its 128,000 tokens, which are those merged first."""
    ranks = folder.parent / f"{folder.name}-ranks.model"
    ranks.write_bytes(b"".join(sources("llama3").read_bytes().splitlines(keepends=True)[:tokens]))
    return folder_of(folder, tokens + 256, ranks, "meta")


def llama2(folder: Path, sources: Callable[[str], Path]) -> Path:
    return folder_of(folder, 32000, sources("llama2_tokenizer.model"), "meta")


def words512(folder: Path, sources: Callable[[str], Path]) -> Path:
    return folder_of(folder, 512, sources("tok512.bin"))


def transformers5(folder: Path, sources: Callable[[str], Path]) -> Path:
    """Llama 2's as transformers 5 saves it: no normalizer, a Metaspace that puts a space before the first text."""
    from transformers import AutoTokenizer

    words512(folder, sources)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").unlink()
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["prepend_scheme"] == "first"
    return folder


def renamed(
    folder: Path, sources: Callable[[str], Path], names: dict[str, str], add: tuple[str, ...], **settings: Any
) -> Path:
    """Llama 3's tokenizer.json with other names for special tokens, and new ones behind them."""
    meta = llama3(folder.parent / f"{folder.name}-meta", sources)
    n = 2256 + len(add)
    folder_of(folder, n, meta / "tokenizer.model")
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    content = json.loads(text)
    content["added_tokens"] += [{"id": 2256 + i, "content": a, **FLAGS, "special": True} for i, a in enumerate(add)]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def chatml(folder: Path, sources: Callable[[str], Path]) -> Path:
    added = ("<|im_start|>", "<|im_end|>")
    bos = "<|begin_of_text|>"
    return renamed(folder, sources, {}, added, bos_token=bos, eos_token=added[1], chat_template=CHATML)


def deepseek(folder: Path, sources: Callable[[str], Path]) -> Path:
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    names = {"<|begin_of_text|>": bos, "<|end_of_text|>": eos}
    added = ("<｜User｜>", "<｜Assistant｜>")
    return renamed(
        folder,
        sources,
        names,
        added,
        bos_token={"__type": "AddedToken", "content": bos, **FLAGS},
        eos_token={"__type": "AddedToken", "content": eos, **FLAGS},
        chat_template=DEEPSEEK,
    )


def gpt2(folder: Path, sources: Callable[[str], Path]) -> Path:
    """Byte-level BPE as SmolLM's: digits by one, special tokens first, no BOS before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(sources("tinystories_valid_excerpt.txt"))], trainer)
    folder_of(folder, made.get_vocab_size(), None)
    made.save(str(folder / "tokenizer.json"))
    kind = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": special[1],
        "eos_token": special[2],
        "pad_token": special[2],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, "chat_template": CHATML}))
    return folder


def padded(folder: Path, sources: Callable[[str], Path]) -> Path:
    """More rows than tokens, a multiple of 64."""
    return folder_of(folder, 576, sources("tok512.bin"))


def beside(folder: Path, sources: Callable[[str], Path]) -> Path:
    """ChatML's tokens stand in tokenizer_config.json alone, as the first tuners of Llama 2 saved them."""
    folder_of(folder, 576, sources("tok512.bin"))
    path = folder / "tokenizer_config.json"
    more = {512: "<|im_start|>", 513: "<|im_end|>"}
    listed = {str(i): {"content": name, **FLAGS, "special": True} for i, name in more.items()}
    settings = json.loads(path.read_text()) | {"added_tokens_decoder": listed, "eos_token": more[513]}
    path.write_text(json.dumps(settings | {"chat_template": CHATML}))
    (folder / "tokenizer.model").unlink()
    return folder


def beside_model(folder: Path, sources: Callable[[str], Path]) -> Path:
    """No tokenizer.json: a sentencepiece model, and added_tokens.json beside it."""
    beside(folder, sources)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    del settings["added_tokens_decoder"]
    path.write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 513, "<|im_start|>": 512}))
    shutil.copy(words512(folder.parent / f"{folder.name}-512", sources) / "tokenizer.model", folder)
    (folder / "tokenizer.json").unlink()
    return folder


VOCABULARIES = {
    "Llama 3": llama3,
    "Llama 2": llama2,
    "Llama 2 by transformers 5": transformers5,
    "512 words": words512,
    "ChatML Llama 3": chatml,
    "GPT-2-style BPE": gpt2,
    "padded rows": padded,
    "DeepSeek names": deepseek,
    "tokens in tokenizer_config": beside,
    "tokens in added_tokens.json": beside_model,
}


def without(folder: Path, *names: str) -> Path:
    """The folder again, beside it, some files left out."""
    copy = folder.parent / f"{folder.name}-less"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*names))
    return copy


def facts(tokenizer: Path) -> dict[str, Any]:
    """What a conversion has to keep of a tokenizer file."""
    found = read(tokenizer)
    keys = ("bos_id", "eos_id", "add_bos", "chat_template", "special_ids")
    return {key: getattr(found, key) for key in keys} | {"stop_ids": set(found.stop_ids), "n": len(found.tokens)}
