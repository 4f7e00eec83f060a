"""The first document as training sees it: what is learned, what is only read, and which pieces are special tokens. A
wrong chat template shows at once.

    print(in_terminal(pieces_of(patient), colour=True))
"""

import html
from typing import NamedTuple

from finetune.doctor.patient import Patient
from nanollama.printable import STEERING

MOST_TOKENS = 400
LEARNED, READ, SPECIAL, RESET = "\033[32m", "\033[2m", "\033[1;35m", "\033[0m"
OPEN, CLOSE = "⟦", "⟧"  # around what is learned, where there is no colour


class Piece(NamedTuple):
    """Neighbouring tokens of one kind."""

    text: str
    learned: bool
    special: bool


def pieces_of(patient: Patient) -> list[Piece]:
    """The first document, or its beginning."""
    ids, mask = patient.documents[0]
    tokenizer, pieces = patient.tokenizer, list[Piece]()
    special = set(tokenizer.special_ids.values()) | {tokenizer.bos_id, tokenizer.eos_id}
    run: list[int] = []
    kind = (False, False)
    for token, learned in [*zip(ids[:MOST_TOKENS].tolist(), mask[:MOST_TOKENS].tolist(), strict=True), (-1, None)]:
        if run and (kind != (learned, token in special) or kind[1]):
            pieces.append(Piece(_text(patient, run, special=kind[1]), *kind))
            run = []
        run, kind = [*run, token], (learned, token in special)
    return [*pieces, Piece(f" ... {len(ids) - MOST_TOKENS:,} more", False, False)] if len(ids) > MOST_TOKENS else pieces


def _text(patient: Patient, ids: list[int], *, special: bool) -> str:
    text = patient.tokenizer.decode(ids)
    names = {i: name for name, i in patient.tokenizer.special_ids.items()}
    return names.get(ids[0], text or f"[{ids[0]}]") if special else text


def in_terminal(pieces: list[Piece], *, colour: bool) -> str:
    """Green is learned, dim is read, bold is a special token; without colour ⟦learned⟧."""
    shown = ""
    for text, learned, special in pieces:
        plain = STEERING.sub("\ufffd", text)
        if colour:
            shown += f"{LEARNED if learned else READ}{SPECIAL if special else ''}{plain}{RESET}"
        else:
            shown += f"{OPEN}{plain}{CLOSE}" if learned else plain
    return shown.replace(CLOSE + OPEN, "")


def in_html(pieces: list[Piece]) -> str:
    """Spans of the classes learned, read and special."""
    return "".join(
        f'<span class="{"learned" if piece.learned else "read"}{" special" if piece.special else ""}">'
        f"{html.escape(piece.text)}</span>"
        for piece in pieces
    )
