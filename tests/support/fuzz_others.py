"""What is fuzzed besides texts and weights: runs, shards, tables, kits, a program's answers, columns of two engines.

other_targets(Path("work"))["kit"].attempt(data)      # None, or the line that refuses it
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tiny
from finetune.config import TrainConfig, resolve, to_json
from finetune.data.packing import Cursor
from finetune.optim import make_optimizer
from finetune.parallelize import World
from finetune.resume import Progress, RunFolder, resume
from finetune.save import Saver
from fuzz_answers import answers_target
from fuzz_kit import kit_target
from fuzz_target import Target
from mutators import Rng, mutate_json, mutate_lines, mutate_safetensors
from mutators_pickle import mutate_pickle, mutate_zip
from parity.mismatch.__main__ import as_lines
from parity.mismatch.columns import read
from parity.mismatch.statistics import statistics

STEP = 3
GIVEN = TrainConfig(init="260K", max_steps=10, seq_len=16, batch_size=2, lr=0.01)


class Run:
    """A run of three steps in this folder, and what it takes to go on with it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config = resolve(replace(GIVEN, **changes), "cpu", 1)
        self.folder, self.model = RunFolder(folder, self.config), tiny.model(dim=16, hidden_dim=24, n_layers=1).train()
        self.optimizer = make_optimizer(self.model, self.config)
        for _ in range(STEP):
            self.model(torch.arange(5)[None]).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        saver = Saver(self.folder, World(torch.device("cpu")), "data", 0)
        saver.save(Progress(STEP, 40, Cursor(1, 0, 2)), self.model, self.optimizer, wait=True)
        saver.close()
        saved = {"entry": "text", "world_size": 1, **to_json(self.config)}
        (folder / "config.json").write_text(json.dumps(saved))
        self.checkpoint = folder / "checkpoints" / f"step_{STEP:08d}"

    def restore(self) -> None:
        self.folder.restore_(self.model, self.optimizer, "data")

    def target(self, file: str, change: Callable[[bytes, Rng], bytes]) -> Target:
        return Target(self.checkpoint / file, change, self.restore)


def shard_target(run: Run) -> Target:
    """A shard's parts, each a file of torch's: changed one by one, with a list that says where they now lie."""
    folder = run.checkpoint / "shards"
    listed = pickle.loads((folder / ".metadata").read_bytes())  # which was written here
    places = sorted(listed.storage_data.items(), key=lambda item: item[1].offset)
    (name,) = {place.relative_path for _, place in places}
    data = (folder / name).read_bytes()
    parts = [data[place.offset : place.offset + place.length] for _, place in places]
    packed = folder.parent / "parts"
    packed.write_bytes(pickle.dumps(parts))

    def change(data: bytes, rng: Rng) -> bytes:
        changed = pickle.loads(data)
        at = rng.randrange(len(changed))
        if rng.random() < 0.1:
            changed[at] = changed[rng.randrange(len(changed))]
        else:
            changed[at] = mutate_zip(changed[at], rng)
        return pickle.dumps(changed)

    def restore() -> None:
        at, changed = 0, pickle.loads(packed.read_bytes())
        for (_, place), part in zip(places, changed, strict=True):
            place.offset, place.length, at = at, len(part), at + len(part)
        (folder / name).write_bytes(b"".join(changed))
        (folder / ".metadata").write_bytes(pickle.dumps(listed))
        run.restore()

    return Target(packed, change, restore)


def columns_targets(folder: Path) -> dict[str, Target]:
    ids, a, b = (folder / f"{name}.jsonl" for name in ("ids", "a", "b"))
    values = [[None, -0.1, -2.5], {"logprobs": [-1.0, -0.5]}, {"prompt_logprobs": [None, {"7": {"logprob": -0.1}}]}]
    ids.write_text('[1, 2, 3]\n{"tokens": [4, 5]}\n{"prompt_token_ids": [6], "response_ids": [7]}\n')
    for path in (a, b):
        path.write_text("".join(json.dumps(value) + "\n" for value in values))

    def compare() -> None:
        found = read(ids, a, b)
        numbers = statistics(found.a, found.b)
        assert as_lines(numbers, found, []) and numbers["max_abs_difference"] < float("inf")

    return {"engine's log": Target(a, mutate_lines, compare), "engine's ids": Target(ids, mutate_lines, compare)}


def other_targets(root: Path) -> dict[str, Target]:
    """By reader."""
    root.mkdir(parents=True)
    whole = {name: Run(root / name) for name in ("state", "moments", "config")}
    sharded = {name: Run(root / name, save="sharded") for name in ("list", "shard")}
    config = root / "config" / "config.json"
    return {
        "run's state": whole["state"].target("state.json", mutate_json),
        "run's moments": whole["moments"].target("optimizer.safetensors", mutate_safetensors),
        "run's config": Target(
            config, mutate_json, partial(resume, "text", TrainConfig(out=str(root / "config")), TrainConfig())
        ),
        "list of shards": sharded["list"].target("shards/.metadata", mutate_pickle),
        "shard": shard_target(sharded["shard"]),
        "kit": kit_target(root / "kit"),
        "program's answers": answers_target(root / "answers"),
        **columns_targets(root),
    }
