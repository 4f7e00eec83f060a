"""Look at a run before it begins, thoroughly: the same line as the training command, its entry as the first word.

$ python -m finetune.doctor chat --data dialogs.jsonl --ckpt Llama-3.2-1B --lr 2e-3
doctor: rate too high: at --lr 0.002 8 steps on one batch bring its loss from 2.31 to 7.90, at 2e-05 to 1.96: lower --lr
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune import chat, preference, text, tinyshakespeare, tinystories
from finetune.config import TrainConfig
from finetune.data.files import write_atomically
from finetune.doctor.examine import as_dialogues, examine, lines, of_pairs
from finetune.doctor.page import page
from finetune.doctor.patient import Patient
from finetune.doctor.picture import in_terminal, pieces_of
from finetune.doctor.rate import find_rate
from finetune.errors import UserError
from finetune.run import Entry, only_set_up
from nanollama.cli import run

ENTRIES = (text.ENTRY, chat.ENTRY, preference.ENTRY, tinystories.ENTRY, tinyshakespeare.ENTRY)


def command(entry: Entry) -> Callable[..., int]:
    """The doctor's command for one entry, whose flags it takes."""
    usual = TrainConfig(**entry.defaults)

    def call(
        *,
        config: TrainConfig = usual,
        find_lr: bool = False,  # also try a range of rates on one batch, and suggest one
        html: Path | None = None,  # also write what was found, and the first document in colour, to this file
    ) -> int:
        """Look for ills of a run before it begins; exit code 1 where there are some."""
        return see(entry, config, find_lr=find_lr, html=html)

    return call


def see(entry: Entry, config: TrainConfig, *, find_lr: bool, html: Path | None) -> int:
    """Everything; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        setup = only_set_up(entry, replace(config, out=str(Path(folder) / "run"), resume=False))
        if find_lr and of_pairs(setup):
            raise UserError("--find_lr tries rates on the next token's loss, and pairs have another: leave it out")
        patient = Patient.of(as_dialogues(setup), talks=entry.talks, thorough=not of_pairs(setup))
        findings, pieces = examine(patient), pieces_of(patient)
        print("first document, in green what is learned:" if sys.stdout.isatty() else "first document, ⟦learned⟧:")
        print(in_terminal(pieces, colour=sys.stdout.isatty()))
        for fact in patient.facts:
            print(f"  {fact}")
        if find_lr:
            tried, suggested = find_rate(patient)
            for trial in tried:
                print(f"  --lr {trial.rate:<9.2g} loss {trial.losses[0]:.3f} -> {trial.last:.3f}")
            print(f"  suggested: --lr {suggested:.1g}")
    print("\n".join(lines(findings)) or "doctor: nothing found")
    if html:
        write_atomically(html, page(findings, patient.facts, pieces).encode())
    return int(bool(findings))


if __name__ == "__main__":
    run({entry.name: command(entry) for entry in ENTRIES}, prog="python -m finetune.doctor")
