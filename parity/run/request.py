"""From flags to what is run: a frozen Request, and with the checkpoint a Plan, whose Case every process gets.

`python -m parity.check`, `python -m parity.kit --out` and `python -m parity.mutants --ckpt` all go this way.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parity.contract import DTYPES, Case, UsageError
from parity.run.prompts import CORPUS, DIALOGS, Prompts, built_in, from_file, seeded, within
from parity.run.training import training_case

if TYPE_CHECKING:
    from parity.candidates.nano.checkpoint import Description

REFERENCES = {"meta": "llama_models", "hf": "transformers"}  # name -> the package that it is
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # org/name; a path that starts with a dot is none
FAR_POSITIONS = (8191, 8192, 131071)
ROPE_POSITIONS = (*range(64), 511, 1023, 4095, *FAR_POSITIONS)
# Of each sequence of a large checkpoint, taps are kept at this many positions; logits at all.
LARGE_POSITIONS = 16
UNTRAINED = "training is checked on small checkpoints in fp32"
TRAINED_PARAMETERS = 4_000_000  # larger models are trained only where --checks names it
MORE_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Request:
    """What is asked of one run. `ckpt`: None for the embedded one; `candidate`: "" for the references alone."""

    candidate: str = ""
    ckpt: str | None = None
    tokenizer: str | None = None
    references: tuple[str, ...] = tuple(REFERENCES)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    checks: tuple[str, ...] = ()
    named: bool = False  # the checks were chosen by the user
    device: str = "cpu"
    prompts: Path | None = None
    max_new_tokens: int = 32
    texts: bool = True  # the corpus and the dialogs are asked for, too
    twin: bool = True
    cache: bool = True
    keep: Path | None = None  # where the traces are kept instead, of a checkpoint of any size


@dataclass(frozen=True)
class Plan:
    """One run: who runs which Case, on which files, in which order."""

    case: Case
    references: tuple[str, ...]
    first: str  # of them: turns texts into ids and continues them
    candidate: str = ""
    witnesses: tuple[str, ...] = ()  # references that are asked for the ids of the case's texts alone
    # Checkpoint and tokenizer as the candidate opens them, where the references need them in another form.
    own_files: tuple[str, str | None] | None = None
    ops: bool = True  # a candidate that has ops() is given the references' inputs, operation by operation
    large: bool = False  # one dtype and one process at a time; a candidate's trace goes when it is measured
    untrained: str = UNTRAINED  # why the case trains nothing
    notices: tuple[str, ...] = ()


# --- Flags -----------------------------------------------------------------------------------------------------------


def split_list(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The items of a comma list, each one known. Raises UsageError."""
    items = tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    for item in items:
        if item not in known:
            raise UsageError(f"{flag} {item!r} is unknown: expected {', '.join(known)}")
    if not items:
        raise UsageError(f"{flag} is empty: expected a comma list of {', '.join(known)}")
    return items


def split_dtypes(text: str) -> tuple[str, ...]:
    return split_list("--dtype", text, tuple(DTYPES))


def require_installed(references: Sequence[str]) -> None:
    """Raises UsageError where a reference's package is missing."""
    for module in (REFERENCES[name] for name in references):
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"the package {module} is not installed: pip install 'llama-parity[parity]', or leave its reference out"
            )


def require_files(request: Request) -> None:
    """Raises UsageError where a checkpoint or a tokenizer is not there."""
    ckpt, tokenizer = request.ckpt, request.tokenizer
    if ckpt is not None and not Path(ckpt).exists() and not re.fullmatch(HUB_ID, ckpt):
        raise UsageError(
            f"--ckpt {ckpt}: no such file; give a Meta or Hugging Face folder, a .gguf, a .bin or a hub id"
        )
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise UsageError(f"--tokenizer {tokenizer}: no such file")


# --- The plan --------------------------------------------------------------------------------------------------------


def plan(
    request: Request,
    checkpoint: "Description",
    folder: Path,
    max_positions: int | None = None,
    prompts: Prompts | None = None,
    large: bool | None = None,
) -> Plan:
    """Everything about a run that is known before it begins. Raises UsageError.

    folder: where what the references need in another form is written. max_positions: what the candidate holds, where it
    says so. prompts: in place of the request's. large: whether memory holds one model; decided by its size.
    """
    from parity.candidates.nano.checkpoint import reference_files
    from parity.machine import SMALL_BYTES, cores, too_large

    context = min(checkpoint.context, max_positions or checkpoint.context)
    new_tokens = request.max_new_tokens
    if prompts is None:
        prompts, new_tokens = choose_within(request.prompts, checkpoint, context, new_tokens)
    large = checkpoint.stored_bytes > SMALL_BYTES if large is None else large
    untrained = why_untrained(request, large, checkpoint.parameters)
    vocab_size, texts = checkpoint.config["vocab_size"], request.texts and checkpoint.tokenizer is not None
    files = reference_files(checkpoint, folder / "converted", request.references, prompts.texts)
    case = Case(
        **files.as_case(),
        dtypes=order_dtypes(request.dtypes, checkpoint.stored_dtype) if large else list(request.dtypes),
        texts=prompts.texts,
        prompts=prompts.tokens,
        corpus=list(CORPUS) if texts else [],
        dialogs=[list(d) for d in DIALOGS] if texts else [],
        device=request.device,
        threads=cores() if large else 1,
        max_new_tokens=new_tokens,
        rope_positions=[p for p in ROPE_POSITIONS if max_positions is None or p < max_positions],
        n_positions=LARGE_POSITIONS if large else None,
        too_large=too_large(checkpoint.parameters, request.dtypes),
        weights="weights" in request.checks,
        training=None if untrained else training_case(vocab_size),
        vocab_size=vocab_size,
        context=context,
    )
    return Plan(
        case,
        request.references,
        files.first,
        request.candidate,
        witnesses=choose_witnesses(request, files.checkpoint) if checkpoint.tokenizer else (),
        own_files=(str(checkpoint.path.resolve()), str(checkpoint.tokenizer) if checkpoint.tokenizer else None),
        ops="ops" in request.checks,
        large=large,
        untrained=untrained,
        notices=(*checkpoint.notices, *files.notices, *prompts.notices),
    )


def order_dtypes(dtypes: Sequence[str], stored: str) -> list[str]:
    """What is stored fits whole (memory-mapped) if anything does: its run makes the greedy text."""
    return sorted(dtypes, key=lambda dtype: dtype != stored)


def choose_witnesses(request: Request, folder: Path) -> tuple[str, ...]:
    """References that are asked for token ids alone: a candidate may follow what the only other one does not open."""
    if request.references != ("meta",) or not {"tokens", "chat"} & set(request.checks):
        return ()
    opens_more = any((folder / name).is_file() for name in MORE_TOKENIZERS)
    return ("hf",) if opens_more and importlib.util.find_spec("transformers") is not None else ()


def why_untrained(request: Request, large: bool, parameters: int) -> str:
    """Why this run trains nothing; empty when it does."""
    if "training" not in request.checks:
        return "it was not asked for"
    if large or "fp32" not in request.dtypes:
        return UNTRAINED
    if not request.named and parameters > TRAINED_PARAMETERS:
        return f"{parameters / 1e6:.0f} million parameters take a while to train: ask for it with --checks training"
    return ""


def choose_prompts(file: Path | None, checkpoint: "Description") -> Prompts:
    """The user's prompts, the built-in ones, or seeded token ids where there is no tokenizer. Raises UsageError."""
    vocab_size = checkpoint.config["vocab_size"]
    prompts = from_file(file) if file else built_in() if checkpoint.tokenizer else seeded(vocab_size)
    if prompts.texts and not checkpoint.tokenizer:
        raise UsageError(f"--prompts {file}: {checkpoint.path} has no tokenizer; give --tokenizer, or a .jsonl of ids")
    for i, ids in enumerate(prompts.tokens or [], 1):
        if max(ids) >= vocab_size:
            raise UsageError(f"--prompts {file}, prompt {i}: id {max(ids)} is outside the {vocab_size} tokens")
    return prompts


def choose_within(
    file: Path | None, checkpoint: "Description", context: int, max_new_tokens: int
) -> tuple[Prompts, int]:
    """Prompts, and how many tokens follow each, that together stay within `context`. Raises UsageError."""
    from parity.candidates.nano.model import load_tokenizer

    prompts = choose_prompts(file, checkpoint)
    new = min(max_new_tokens, context // 2)
    tokenizer = load_tokenizer(checkpoint.tokenizer) if checkpoint.tokenizer else None
    encode = (lambda text: tokenizer.encode(text, bos=True)) if tokenizer else None
    cut = within(prompts, context - new, encode, file)
    if cut is prompts and new == max_new_tokens:
        return prompts, new
    note = f"{context} positions are all that there is: prompts have {context - new} tokens at most, {new} follow"
    return replace(cut, notices=[*cut.notices, note]), new
