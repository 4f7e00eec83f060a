"""All checks in their order, and what is said of them: quick before every run, thorough by `python -m finetune.doctor`.

findings = examine(Patient.of(setup, talks=True, thorough=False))
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune.data.files import Say, write_atomically
from finetune.data.pairs import Pairs
from finetune.doctor.data import check_bos, check_copies, check_labels, check_lengths, check_template
from finetune.doctor.machine import check_dtype, check_memory, time_steps
from finetune.doctor.patient import Finding, Patient
from finetune.doctor.picture import Piece, in_terminal, pieces_of
from finetune.doctor.rate import check_rate
from finetune.doctor.text import check_damage, check_format, check_repeats, check_unknown, check_warmup
from finetune.doctor.weights import check_first_loss, check_gradients, check_largest_length, check_tied_head
from finetune.errors import UserError
from finetune.objective import NEXT_TOKEN
from finetune.train import Setup
from nanollama.gate import CheckpointError
from nanollama.gate.documents import parse, read_bytes

Check = Callable[[Patient], Iterator[Finding]]
NAME = "doctor.json"
MAX_BYTES = 1 << 26

QUICK: tuple[Check, ...] = (
    *(check_bos, check_labels, check_template, check_lengths, check_copies),
    *(check_damage, check_unknown, check_format, check_repeats, check_warmup),
    *(check_tied_head, check_first_loss, check_dtype),
)
THOROUGH: tuple[Check, ...] = (*QUICK, check_memory, check_largest_length, check_gradients, check_rate)
CONSEQUENCES = {  # what another ill brings with it is not said
    "duplicated validation": ("repeated documents",),
    "labels shifted": ("wrong tokenizer", "first loss"),
    "wrong tokenizer": ("does not learn", "rate too high", "rate too low"),
    "tied head broken": ("frozen head",),
    "frozen head": ("does not learn",),
    "frozen tensors": ("does not learn",),
}
NEED_NUMBERS = (check_gradients, check_rate)  # of which there are none where the loss is not finite


def examine(patient: Patient) -> list[Finding]:
    """The ills, each once; the model is as it was afterwards."""
    training, state = patient.model.training, torch.get_rng_state()
    patient.model.eval()
    found: dict[str, Finding] = {}
    for check in THOROUGH if patient.thorough else QUICK:
        if check in NEED_NUMBERS and found.keys() & {"overflow", "all masked"}:
            continue
        for finding in check(patient):
            found.setdefault(finding.ill, finding)
    if patient.thorough:
        time_steps(patient)
    patient.model.train(training)
    torch.set_rng_state(state)
    follow = set().union(*(CONSEQUENCES.get(ill, ()) for ill in found))
    return [finding for ill, finding in found.items() if ill not in follow]


def examine_before(setup: Setup, say: Say, *, talks: bool) -> None:
    """What `--doctor` asks for before a run: the ills are said and kept for the report, and the run goes on."""
    config, world = setup.folder.config, setup.world
    if config.doctor == "off" or config.resume or world.size > 1:
        return
    patient = Patient.of(as_dialogues(setup), talks=talks, thorough=config.doctor == "full" and not of_pairs(setup))
    findings = examine(patient)
    for line in lines(findings):
        say(line)
    pieces = pieces_of(patient)
    if talks:
        say(f"doctor: the first dialogue, what is learned between marks:\n{in_terminal(pieces, colour=False)}")
    write(setup.folder.path, findings, patient.facts, pieces)


def of_pairs(setup: Setup) -> bool:
    return isinstance(setup.train, Pairs)


def as_dialogues(setup: Setup) -> Setup:
    """Of pairs each answer with its prompt is a dialogue: ills of template, tokens and machine are the same, and
    nothing is said of rate and gradients, since the loss is another.
    """
    if not isinstance(setup.train, Pairs) or not isinstance(setup.val, Pairs):
        return setup
    return replace(setup, train=setup.train.sequences, val=setup.val.sequences, objective=NEXT_TOKEN)


def lines(findings: list[Finding]) -> list[str]:
    return [f"doctor: {finding.ill}: {finding.line}" for finding in findings]


def write(out: Path, findings: list[Finding], facts: list[str], pieces: list[Piece]) -> None:
    """OUT/doctor.json, for the report."""
    content = {"findings": [f._asdict() for f in findings], "facts": facts, "first": [p._asdict() for p in pieces]}
    write_atomically(out / NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read(out: Path) -> dict[str, Any] | None:
    """What `write` wrote, of its own types; None where the doctor was not asked. Raises UserError."""
    path = out / NAME
    if not path.exists():
        return None
    try:
        found = parse(read_bytes(path, MAX_BYTES), path)
        facts = found["facts"]
        if not isinstance(facts, list) or not all(isinstance(fact, str) for fact in facts):
            raise TypeError("facts")
        findings = [Finding(**{key: str(value) for key, value in item.items()}) for item in found["findings"]]
        first = [Piece(str(p["text"]), bool(p["learned"]), bool(p["special"])) for p in found["first"]]
    except CheckpointError as error:
        raise UserError(str(error)) from None
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: is not as the doctor wrote it: remove it, or ask for it again") from None
    return {"findings": findings, "facts": facts, "first": first}
