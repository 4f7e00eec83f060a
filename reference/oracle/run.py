"""A case through the oracle: its trace, or with --ops its values of another trace's operations."""

import time
from pathlib import Path

import torch
from torch import Tensor

from reference.driver import set_numerics, versions, weight_hashes, write_rope
from reference.files import Checkpoint, open_folder
from reference.files.weights import Unusable
from reference.oracle import math as ops
from reference.oracle.forward import Oracle, forward, rounding_groups, teacher_forced
from reference.oracle.rounding import NOTHING, Rounded
from reference.oracle.trace import OtherTrace
from reference.oracle.training import train
from reference.protocol import TRACE_SCHEMA, Case, Taps, check_positions, check_sequences, progress, write_json


def run_case(
    case: Case, out: Path, ops_of: Path | None = None, rounded: Rounded = NOTHING, off_ulp: float = 0.0
) -> None:
    """Write the oracle's trace, or with `ops_of` its values of that trace's operations."""
    set_numerics(case.threads)
    checkpoint = open_folder(case.checkpoint)
    groups = rounding_groups(checkpoint, case.dtypes)
    if ops_of is None:
        sequences, positions = _prompts(case, checkpoint), case.positions
        lossless = [name for name in case.dtypes if groups[name] is None]
        folders = {name: lossless[0] if name in lossless else name for name in case.dtypes}
    else:
        sequences, positions = OtherTrace.sequences(ops_of), None
        folders = {name: name for name in case.dtypes}
    check_sequences(sequences, checkpoint.config["vocab_size"])
    check_positions(positions, sequences)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for i, folder in enumerate(sorted(set(folders.values()), key=case.dtypes.index)):
        oracle = Oracle(checkpoint, sequences, groups[folder], off_ulp=off_ulp, rounded=rounded)
        taps = Taps(
            out / folder,
            checkpoint.config,
            lengths=[len(sequence) for sequence in sequences],
            positions=positions,
            dtype=torch.float64 if positions is None else torch.float32,
            logits_dtype=torch.float64,
            record=case.record if ops_of is None else "taps",
        )
        other = None if ops_of is None else OtherTrace(ops_of, folder, sequences)
        _run(oracle, taps, other, i / len(set(folders.values())), 1 / len(set(folders.values())))
    seconds = time.perf_counter() - started
    training = None
    if case.training is not None and ops_of is None:
        training = train(checkpoint, case.training, out)
    rows = torch.tensor(case.rope_positions, dtype=torch.long)
    write_rope(out, *ops.rope_table(checkpoint.config, rows, off_ulp))
    write_json(
        out / "trace.json",
        {
            "schema": TRACE_SCHEMA,
            "implementation": "oracle" if ops_of is None else "oracle-ops",
            "versions": versions(()) | {"threads": str(case.threads), "device": "cpu"},
            "config": checkpoint.config,
            "sequences": sequences,
            "prompt_lengths": [len(sequence) for sequence in sequences],
            "positions": positions,
            "dtypes": folders,
            "streamed": dict.fromkeys(case.dtypes, True),
            "generated_by": None,
            "seconds_forward": seconds,
            "errata": [],
            "notices": list(checkpoint.notices),
            "token_ids": None,
            "corpus_ids": None,
            "dialog_ids": None,
            "weights": weight_hashes(checkpoint) if case.weights else None,
            "training": training,
        },
    )
    progress("done", 1.0)


def _run(oracle: Oracle, taps: Taps, other: OtherTrace | None, done: float, share: float) -> None:
    n_layers = oracle.config["n_layers"]

    def emit(name: str, packed: Tensor) -> None:
        for s, value in enumerate(oracle.split(packed)):
            taps.put(s, name, value)

    def stage(layer: int) -> None:
        taps.close(f"layers.{layer - 1}")
        progress(f"oracle layer {layer + 1}/{n_layers}", done + share * layer / (n_layers + 1))

    with torch.inference_mode():
        normed = forward(oracle, emit, stage) if other is None else teacher_forced(oracle, other, emit, stage)
        progress("oracle output head", done + share * n_layers / (n_layers + 1))
        for start, stop, block in oracle.logit_blocks(normed):
            for s, value in enumerate(oracle.split(block)):
                taps.target(s, "logits")[:, start:stop].copy_(value)
    taps.finish()


def _prompts(case: Case, checkpoint: Checkpoint) -> list[list[int]]:
    """The oracle generates nothing: a case for it holds the sequences that another implementation made."""
    if case.prompts is not None:
        return case.prompts
    if case.texts is None:
        raise Unusable(f"{case.checkpoint}: the case has neither prompts nor texts")
    from reference.meta_text import open_text

    text = open_text(checkpoint, case.tokenizer)
    return [text.encode(one, bos=True) for one in case.texts]


def next_tokens(
    checkpoint: Checkpoint, tokens: list[int], dtype: str, rounded: Rounded = NOTHING, count: int = 5
) -> list[tuple[int, float]]:
    """The likeliest next tokens with their logits."""
    oracle = Oracle(checkpoint, [tokens], rounding_groups(checkpoint, (dtype,))[dtype], rounded=rounded)
    with torch.inference_mode():
        last = forward(oracle, lambda name, value: None)[-1:]
        logits = torch.cat([block[0] for _, _, block in oracle.logit_blocks(last)])
    best = logits.topk(min(count, len(logits)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
