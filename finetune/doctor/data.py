"""Ills of the data, seen in the tokens as training will get them: BOS, labels, lengths, padding, copies, the template.

Each check takes a Patient and yields Findings; healthy data yields none.
"""

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from finetune.build import CHAT_TOKENS, chat_rows
from finetune.data.documents import IGNORE, Documents, Ints
from finetune.data.packing import Cursor
from finetune.doctor.patient import Finding, Patient

FEW_LABELS = 0.02  # of all tokens
MANY_CUT = 0.3  # of all documents
MUCH_PADDING = 0.5  # of all places in rows
MANY_COPIES = 0.05  # of the held-out documents
MOST = 0.5  # of the documents looked at: a fault of the format, not of single ones
FEW_DOCUMENTS = 20  # below it one long text is a corpus, and cut on purpose
QUICK_COPY_TOKENS, COPY_TOKENS = 1_000_000, 20_000_000  # training tokens that are compared
COPY_DOCUMENTS = 500  # held-out documents that are
BEGINNING = 4096  # tokens of a document that are compared, with its length
MARKUP = re.compile(r"<\|[A-Za-z_]{2,32}\|>")
CHAT_NAMES = (*CHAT_TOKENS[:3], "<|im_start|>", "<|im_end|>")


def check_bos(patient: Patient) -> Iterator[Finding]:
    """Documents begin with one BOS, where the tokenizer puts one."""
    bos, seen = patient.tokenizer.bos_id, patient.documents
    if bos is None or not patient.tokenizer.add_bos:
        return
    without = sum(int(ids[0]) != bos for ids, _ in seen)
    doubled = sum(len(ids) > 1 and int(ids[0]) == int(ids[1]) == bos for ids, _ in seen)
    name = patient.tokenizer.decode([bos]) or f"token {bos}"
    if without > MOST * len(seen):
        yield Finding(
            "no BOS",
            f"{without:,} of {len(seen):,} documents do not begin with {name}, which the tokenizer puts before every "
            "text: put it into the chat template, or prepare the data again with this tokenizer",
        )
    if doubled > MOST * len(seen):
        yield Finding(
            "doubled BOS",
            f"{doubled:,} of {len(seen):,} documents begin with {name} twice: take it out of the text or of the chat "
            "template, since the tokenizer puts one already",
        )


def check_labels(patient: Patient) -> Iterator[Finding]:
    """Each label is the token that follows; some tokens are labels; of dialogues not all."""
    batch = patient.batch
    tokens, labels = batch.tokens.cpu().numpy(), batch.labels.cpu().numpy()
    valid = labels != IGNORE
    shift = _shift(tokens, labels, valid)
    if shift != 1:
        where = {0: "the tokens themselves", None: "other tokens than the next ones"}
        yield Finding(
            "labels shifted",
            f"labels are {where.get(shift, f'those {shift} places on')}, not the next tokens: the model would learn "
            "something else; look at what makes the batches",
        )
    seen = patient.documents
    counted, places = sum(int(mask[1:].sum()) for _, mask in seen), sum(len(ids) - 1 for ids, _ in seen)
    share = counted / max(1, places)
    patient.facts.append(f"labels: {share:.0%} of the tokens")
    if not counted:
        yield Finding(
            "all masked",
            f"none of the {places:,} tokens looked at is a label: nothing would be learned; look at the loss mask",
        )
    elif share < FEW_LABELS:
        yield Finding(
            "few labels",
            f"only {share:.1%} of the tokens are labels: long prompts and short answers; shorten what is not learned",
        )
    elif patient.talks and share == 1:
        yield Finding(
            "nothing masked",
            "all tokens of the dialogues are labels, the user's words too: the template's answers cannot be told from "
            "its questions",
        )


def _shift(tokens: Ints, labels: Ints, valid: Ints) -> int | None:
    """How many places after its own token each label stands; None where no place fits."""
    if not valid.any():
        return 1
    for shift in (1, 0, 2, 3, -1):
        moved = np.full_like(tokens, IGNORE)
        begin, end = max(0, shift), tokens.shape[1] + min(0, shift)
        moved[:, begin - shift : end - shift] = tokens[:, begin:end]
        if (moved[valid] == labels[valid]).mean() > 0.99:
            return shift
    return None


def check_lengths(patient: Patient) -> Iterator[Finding]:
    """Documents fit in rows, and rows are full."""
    lengths, seq_len = patient.packer.documents.lengths, patient.config.seq_len
    cut = int((lengths > seq_len).sum())
    patient.facts.append(f"documents longer than a row: {cut:,} of {len(lengths):,}")
    if len(lengths) >= FEW_DOCUMENTS and cut > MANY_CUT * len(lengths):
        limit = patient.model.config.max_seq_len
        can = "raise it" if not patient.config.ckpt else f"raise it (the model reads up to {limit:,})"
        up = can if limit > seq_len or not patient.config.ckpt else "split them where they may be split"
        yield Finding(
            "truncated documents",
            f"{cut:,} of {len(lengths):,} documents are longer than --seq_len {seq_len} and are cut, the median has "
            f"{int(np.median(lengths)):,} tokens: what follows a cut is learned without its beginning; {up}",
        )
    rows = patient.packer.window(*_first_window())
    used = sum(int(patient.packer.lengths[row].sum()) for row in map(np.array, rows))
    padding = 1 - used / (len(rows) * seq_len)
    patient.facts.append(f"padding: {padding:.0%} of the rows")
    if padding > MUCH_PADDING:
        longest = int(patient.packer.lengths.max())
        yield Finding(
            "padding",
            f"{padding:.0%} of the rows is padding, computed for nothing: --seq_len {max(longest, 16)} holds the "
            "longest document",
        )


def _first_window() -> tuple[int, int]:
    cursor = Cursor()
    return cursor.epoch, cursor.window


def check_copies(patient: Patient) -> Iterator[Finding]:
    """Held-out documents are not in the training data."""
    train, val = patient.packer.documents, patient.val
    count = min(len(val.lengths), COPY_DOCUMENTS)
    wanted = {_digest(val, i) for i in range(count)}
    sizes = np.unique(val.lengths[:count])
    most = COPY_TOKENS if patient.thorough else QUICK_COPY_TOKENS
    near = np.searchsorted(np.cumsum(train.lengths), most) + 1
    same_size = np.flatnonzero(np.isin(train.lengths[:near], sizes))
    found = wanted & {_digest(train, int(i)) for i in same_size}
    copies = sum(_digest(val, i) in found for i in range(count)) if found else 0
    if copies > MANY_COPIES * count:
        yield Finding(
            "duplicated validation",
            f"{copies:,} of {count:,} held-out documents are in the training data word for word: the validation loss "
            "says nothing about new text; remove the copies, or hold out other documents",
        )


def _digest(documents: Documents, i: int) -> bytes:
    """Of a document: its length and its beginning."""
    length = int(documents.lengths[i])
    beginning = documents.tokens(i, 0, min(length, BEGINNING))
    return hashlib.blake2b(beginning.tobytes() + length.to_bytes(8, "little"), digest_size=16).digest()


def check_template(patient: Patient) -> Iterator[Finding]:
    """The words of the chat format are tokens of the model, and an answer ends with one that stops it."""
    if not patient.talks:
        return
    tokenizer, seen = patient.tokenizer, patient.documents
    special = set(tokenizer.special_ids.values())
    spelled = [set(MARKUP.findall(tokenizer.decode([i for i in ids.tolist() if i not in special]))) for ids, _ in seen]
    common = sorted(n for n in set().union(*spelled) if sum(n in names for names in spelled) > MOST * len(seen))
    used = {int(i) for ids, _ in seen for i in np.unique(ids)}
    own = [name for name in CHAT_NAMES if name in tokenizer.special_ids]
    unused = own and not any(tokenizer.special_ids[name] in used for name in own)
    if common or unused:
        what = f"{', '.join(common[:4])} are no tokens of this vocabulary and are spelled out" if common else ""
        theirs = f"none of its own {', '.join(own[:4])} is used" if unused else ""
        yield Finding(
            "wrong template",
            f"the chat template is another model's: {'; '.join(filter(None, (what, theirs)))}: take the template that "
            "came with the checkpoint",
        )
    unended = sum(bool(mask.any()) and int(ids[mask][-1]) not in tokenizer.stop_ids for ids, mask in seen)
    if unended > MOST * len(seen):
        yield Finding(
            "no end of turn",
            f"{unended:,} of {len(seen):,} dialogues do not end with a token that stops an answer: the model would "
            "learn to go on; look at the template and at the EOS of generation_config.json",
        )
    rows = chat_rows(patient.model, tokenizer, "auto") if patient.config.chat_rows == "keep" else ()
    untrained = [name for name, i in tokenizer.special_ids.items() if i in rows and i in used]
    if untrained:
        yield Finding(
            "untrained chat words",
            f"the rows of {', '.join(sorted(untrained)[:4])} were never trained: add --chat_rows auto",
        )
