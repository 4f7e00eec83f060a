"""What is fuzzed: of each reader a valid file, how it is changed, how it is opened, and which errors are a refusal.

targets(Path("work"))["tiktoken"].attempt(data)      # None, or the line that refuses it
"""

import base64
import json
import struct
from functools import partial
from pathlib import Path

from finetune.data.dialogs import read_dialogs
from fuzz_tables import parquet_target
from fuzz_target import Target
from mutators import mutate_json, mutate_lines
from mutators_text import mutate_bin_tokens, mutate_protobuf, mutate_ranks, varint
from nanollama import vocabulary
from nanollama.gate import documents
from nanollama.tokenizer import open_tokenizer
from nanollama.vocabulary import write as vocabulary_files

SENTENCE = "once on a dance, 12 é"


def read_tokens(path: Path) -> None:
    tokenizer = open_tokenizer(path)
    ids = tokenizer.encode(SENTENCE, bos=True)
    assert isinstance(tokenizer.decode(ids), str) and max(ids) < tokenizer.vocab_size


# --- Valid files -----------------------------------------------------------------------------------------------------


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentencepiece_file() -> bytes:
    """BPE with byte fallback."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256))]
    pieces += [(text, -float(i), 1) for i, text in enumerate(["on", "▁a", *"▁abcdeno"])]
    parts = [
        message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
        for text, score, kind in pieces
    ]
    return b"".join(parts) + message(2, b"\x18\x02\x98\x02\x01") + message(3, b"\x18\x01\x20\x00")


def vocabularies(folder: Path) -> dict[str, Path]:
    """The same few tokens in every format."""
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"on", b"ce", b"once"]
    ranks = folder / "ranks" / "tokenizer.model"
    pieces = folder / "pieces" / "tokenizer.model"
    for path in (ranks, pieces, folder / "json" / "x", folder / "bin" / "x"):
        path.parent.mkdir(parents=True)
    ranks.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    pieces.write_bytes(sentencepiece_file())
    (folder / "json" / "tokenizer.json").write_bytes(
        vocabulary_files.hf_files(vocabulary.read(ranks))["tokenizer.json"]
    )
    (folder / "bin" / "tokenizer.bin").write_bytes(vocabulary_files.llama2c(vocabulary.read(pieces)))
    return {
        "tiktoken": ranks,
        "tokenizer.model": pieces,
        "tokenizer.json": folder / "json" / "tokenizer.json",
        "tokenizer.bin": folder / "bin" / "tokenizer.bin",
    }


TEXTS = {"tiktoken": mutate_ranks, "tokenizer.model": mutate_protobuf, "tokenizer.json": mutate_json,
         "tokenizer.bin": mutate_bin_tokens}  # fmt: skip
DIALOGUES = [
    {"messages": [{"role": "user", "content": "on"}, {"role": "assistant", "content": "once"}]},
    {"conversations": [{"from": "human", "value": "on"}, {"from": "gpt", "value": "a"}], "system": "b"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
]
CONFIG = {"hidden_size": 64, "rms_norm_eps": 1e-5, "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
          "architectures": ["LlamaForCausalLM"], "torch_dtype": None, "vocab_size": 128256}  # fmt: skip


def targets(folder: Path) -> dict[str, Target]:
    """By reader."""
    texts, chat, config = vocabularies(folder / "vocabularies"), folder / "chat.jsonl", folder / "config.json"
    chat.write_text("".join(json.dumps(d) + "\n" for d in DIALOGUES))
    config.write_text(json.dumps(CONFIG))
    speaker = open_tokenizer(texts["tiktoken"])
    table = parquet_target(folder / "rows.parquet")
    return {
        **{name: Target(path, TEXTS[name], partial(read_tokens, path)) for name, path in texts.items()},
        "chat": Target(chat, mutate_lines, lambda: read_dialogs(chat, speaker, 64, on_bad="skip")),
        "json of a checkpoint": Target(config, mutate_json, lambda: documents.read_json(config)),
        **({"parquet": table} if table else {}),
    }
