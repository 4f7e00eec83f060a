"""Ills of the text itself: it was damaged before it came here, it is no text but rows or dialogues, one document stands
there many times, or the vocabulary has no tokens for it.

Each check takes a Patient and yields Findings; healthy text yields none.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

from finetune.data.packing import Packer
from finetune.doctor.data import MARKUP, MOST, QUICK_COPY_TOKENS
from finetune.doctor.patient import Finding, Patient

DAMAGED = "\ufffd"  # what a decoder puts where bytes were no UTF-8
MUCH_UNKNOWN = 0.05  # of the tokens
LINES = 200  # of a text that are tried as JSON
FEW = 3  # lines or documents that say nothing of a format


def check_damage(patient: Patient) -> Iterator[Finding]:
    """No characters were lost before: in the middle of a text, since its end may be cut within one."""
    texts = texts_of(patient)
    damaged = sum(DAMAGED in text.strip(DAMAGED) for text in texts)
    if damaged > MOST * len(texts):
        yield Finding(
            "damaged text",
            f"{damaged:,} of {len(texts):,} documents hold U+FFFD, which stands for characters that were lost when the "
            "text was read in a wrong encoding: make it anew from its source, as UTF-8",
        )


def check_unknown(patient: Patient) -> Iterator[Finding]:
    """The vocabulary has tokens for the text."""
    unknown, seen = patient.tokenizer.vocabulary.unknown_id, patient.documents
    count, all_tokens = sum(int((ids == unknown).sum()) for ids, _ in seen), sum(len(ids) for ids, _ in seen)
    if unknown is not None and count > MUCH_UNKNOWN * all_tokens:
        yield Finding(
            "unknown tokens",
            f"{count / all_tokens:.0%} of the tokens are {patient.tokenizer.decode([unknown]).strip() or '<unk>'}: the "
            "vocabulary lacks the characters of this text: take a tokenizer with bytes, or one of its language",
        )


def check_format(patient: Patient) -> Iterator[Finding]:
    """A text is no file of rows; one for a checkpoint holds no dialogues with their marks spelled out."""
    if patient.talks:
        return
    texts = texts_of(patient)
    lines = [line for text in texts for line in text.splitlines() if line.strip()][:LINES]
    objects = [_keys_of(line) for line in lines]
    keys, rows = Counter(key for found in objects for key in found), sum(map(bool, objects))
    if rows > MOST * len(lines) and rows >= FEW:
        named = ", ".join(name for name, _ in keys.most_common(3))
        yield Finding(
            "rows as text",
            f"{rows:,} of {len(lines):,} lines looked at are JSON objects ({named}), and braces and keys would be "
            "learned, too: name the file .jsonl, with --field for its text; for dialogues use finetune.chat",
        )
    marked = [set(MARKUP.findall(text)) for text in texts]
    common = [name for name, n in Counter(name for found in marked for name in found).items() if n > MOST * len(texts)]
    if patient.config.ckpt and common and len(texts) >= FEW:
        yield Finding(
            "marks as text",
            f"most documents spell out {', '.join(sorted(common)[:4])}, which text never turns into special tokens: "
            "give dialogues to finetune.chat as messages, or take the marks out",
        )


def check_repeats(patient: Patient) -> Iterator[Finding]:
    """Most documents stand in the training data once."""
    packer = patient.packer
    lengths, tokens, digests = packer.documents.lengths, 0, Counter[bytes]()
    for i, length in enumerate(lengths.tolist()):
        if tokens >= QUICK_COPY_TOKENS:
            break
        tokens += length
        digests[_digest(packer, i, length)] += 1
    looked = digests.total()
    copies = looked - len(digests)
    if copies > MOST * looked:
        yield Finding(
            "repeated documents",
            f"{copies:,} of {looked:,} training documents are copies of others: an epoch is "
            f"{looked / len(digests):.1f} passes over what there is; leave the copies out",
        )


def check_warmup(patient: Patient) -> Iterator[Finding]:
    """The rate is reached within the run."""
    config = patient.config
    if 0 < config.max_steps <= config.warmup_steps:
        yield Finding(
            "warmup",
            f"--warmup_steps {config.warmup_steps:,} of {config.max_steps:,} steps: the run ends before its rate is "
            f"reached, at {config.lr * config.max_steps / config.warmup_steps:.2g} instead of {config.lr:g}: leave the "
            "flag out (a twentieth of the steps)",
        )


def texts_of(patient: Patient) -> list[str]:
    """The documents looked at, without special tokens."""
    special = set(patient.tokenizer.special_ids.values())
    return [patient.tokenizer.decode([i for i in ids.tolist() if i not in special]) for ids, _ in patient.documents]


def _keys_of(line: str) -> tuple[str, ...]:
    """Of a line that is one JSON object; else none."""
    if not line.lstrip().startswith('{"'):
        return ()
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    return tuple(found) if isinstance(found, dict) else ()


def _digest(packer: Packer, i: int, length: int) -> bytes:
    return hashlib.blake2b(packer.documents.tokens(i, 0, length).tobytes(), digest_size=16).digest()
