"""Files of token ids and of log-probabilities, a sequence a line -> the tokens that both sides list.

ids       [1, 2, 3], or an object with one of the keys of IDS
values    [null, -0.1, -2.5] beside the ids, one a token (of the first there is none), or one less; a column that is
          shorter belongs to the last tokens (an answer behind its prompt); an object with one of the keys of VALUES
vLLM      prompt_logprobs: [null, {"2": {"logprob": -0.1, ...}, ...}, ...]: the token's own is taken

    columns = read(Path("ids.jsonl"), Path("trainer.jsonl"), Path("engine.jsonl"))
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollama.gate import CheckpointError, require_file, shown
from parity.contract import UsageError

IDS = ("tokens", "token_ids", "ids", "input_ids", "prompt_token_ids", "response_ids", "completion_ids")
VALUES = (
    *("logprobs", "log_probs", "token_logprobs", "prompt_logprobs"),
    *("rollout_log_probs", "old_log_probs", "actor_log_probs"),  # verl
    *("trainer_logprobs", "inference_logprobs"),  # prime-rl
    *("sampling_per_token_logps", "old_per_token_logps", "per_token_logps"),  # TRL
)
MAX_ID = 1 << 31  # no vocabulary has so many
NOT_LISTED = -1e6  # below it a value is a mask's


@dataclass(frozen=True)
class Columns:
    """N tokens that both sides list: sequence (N,) and position (N,) of each, a and b (N,) float64 in nats."""

    sequences: list[list[int]]
    sequence: Tensor
    position: Tensor
    a: Tensor
    b: Tensor
    left_out: int = 0  # tokens that one side alone lists


def read(tokens: Path, a: Path, b: Path) -> Columns:
    """Raises UsageError with file and line."""
    sequences = [_ids(row, where) for where, row in _rows(tokens)]
    sides = [[_values(row, where) for where, row in _rows(path)] for path in (a, b)]
    for path, found in zip((a, b), sides, strict=True):
        if len(found) != len(sequences):
            raise UsageError(f"{path} has {len(found)} sequences and {tokens} {len(sequences)}: one a line in each")
    places: list[tuple[int, int]] = []
    values: list[tuple[float, float]] = []
    left_out = 0
    for i, ids in enumerate(sequences):
        at = [_at_tokens(found[i], ids, f"{path} line {i + 1}") for path, found in zip((a, b), sides, strict=True)]
        both = sorted(at[0].keys() & at[1].keys())
        left_out += len(at[0].keys() ^ at[1].keys())
        places += [(i, p) for p in both]
        values += [(at[0][p], at[1][p]) for p in both]
    if not places:
        raise UsageError(f"{a} and {b} list no token in common")
    sequence, position = torch.tensor(places).unbind(1)
    first, second = torch.tensor(values, dtype=torch.float64).unbind(1)
    return Columns(sequences, sequence, position, first, second, left_out)


def _rows(path: Path) -> list[tuple[str, Any]]:
    """(where, value) of each line that holds one. Raises UsageError for a file that is none."""
    found, number = [], 0
    try:
        require_file(path)
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found.append((f"{path} line {number}", json.loads(line)))
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8: expected .jsonl, a sequence a line") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} line {number}: not JSON: expected a sequence a line") from None
    if not found:
        raise UsageError(f"{path} is empty")
    return found


def _ids(row: Any, where: str) -> list[int]:
    if isinstance(row, dict):
        prompt, answer = row.get("prompt_token_ids"), row.get("response_ids", row.get("completion_ids"))
        joined = [*prompt, *answer] if isinstance(prompt, list) and isinstance(answer, list) else None
        row = joined or _of(row, IDS, where)
    if not isinstance(row, list) or len(row) < 2 or not all(type(i) is int and 0 <= i < MAX_ID for i in row):
        raise UsageError(f"{where}: expected a list of at least two token ids, got {shown(row)}")
    return row


def _of(row: dict[str, Any], keys: Sequence[str], where: str) -> Any:
    named = [key for key in keys if key in row]
    if not named:
        raise UsageError(f"{where}: has none of the keys {', '.join(keys)}")
    return row[named[0]]


def _values(row: Any, where: str) -> list[Any]:
    row = _of(row, VALUES, where) if isinstance(row, dict) else row
    if not isinstance(row, list) or not row:
        raise UsageError(f"{where}: expected a list of log-probabilities, got {shown(row)}")
    return row


def _at_tokens(row: list[Any], ids: list[int], where: str) -> dict[int, float]:
    """Position -> log-probability of the token there."""
    if len(row) > len(ids):
        raise UsageError(f"{where}: {len(row)} log-probabilities for {len(ids)} tokens: another tokenisation?")
    start = len(ids) - len(row)
    found = {}
    for position, value in enumerate(row, start=start):
        value = _own(value, ids[position], f"{where}, token {position}") if isinstance(value, dict) else value
        if value is None or position == 0:
            continue
        # -Infinity is a mask's. A whole number may be larger than any float.
        if type(value) not in (int, float) or not value < -NOT_LISTED:
            raise UsageError(f"{where}, token {position}: {shown(value)} is no log-probability")
        if value > NOT_LISTED:
            found[position] = float(value)
    return found


def _own(listed: dict[str, Any], token: int, where: str) -> Any:
    """Of vLLM's dict by ids the token's own."""
    if str(token) not in listed:
        raise UsageError(f"{where}: lists no log-probability of id {token} itself: another tokenisation?")
    own = listed[str(token)]
    return own.get("logprob") if isinstance(own, dict) else own
