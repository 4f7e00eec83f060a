"""A program (cmd:) whose answers are changed: the lines that it says, the shapes in them, the files that it writes.

answers_target(Path("work")).attempt(data)      # None: what it did is in the trace, as failures of its checks
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from checkpoint_cases import LLAMA31, make_weights, write
from fuzz_target import Target
from mutators import mutate_json
from parity.candidates import command
from parity.contract import Case
from parity.run.run_candidate import record
from parity.trace import TraceWriter
from reference.protocol import tap_names, tap_shape

CONFIG = replace(LLAMA31, dim=8, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=6, hidden_dim=12, n_layers=1)
PLAIN = {key: getattr(CONFIG, key) for key in ("n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "dim")}
PROMPT = [1, 2, 3]
# Request -> what is said behind it, and the numbers of each file that it writes ("" for the one that it is told).
SCRIPT: dict[str, Any] = {
    "can": {"says": "ok logits taps prefill rope config weights encode encode_plain encode_chat declare"},
    "declare": {"says": 'ok {"notices": ["a word"]}'},
    "logits": {"says": "ok [1, 3, 6]", "files": {"": 18}},
    "prefill": {"says": "ok", "files": {"": 18}},
    "rope": {"says": "ok", "files": {"cos": 4, "sin": 4}},
    "taps": {
        "says": "ok",
        "files": {tap: 3 * torch.Size(tap_shape(PLAIN, tap)).numel() for tap in tap_names(1) if tap != "logits"},
    },
    "config": {"says": "ok " + json.dumps(PLAIN)},
    "weights": {"says": 'ok {"norm.weight": {"shape": [8], "crc32": 7}}'},
    "encode": {"says": "ok 1 2 3"},
    "encode_plain": {"says": "ok 2 3"},
    "encode_chat": {"says": "none"},
}


class Scripted:
    """A program that says and writes what its script has for the request."""

    def __init__(self, words: list[str], limits: Any, environment: dict[str, str] | None = None) -> None:
        self.script = json.loads(Path(words[1]).read_text())

    def ask(self, line: str) -> str:
        request, _, rest = line.partition(" ")
        entry = self.script.get(request) if isinstance(self.script, dict) else None
        entry = entry if isinstance(entry, dict) else {}
        place, files = Path(rest.split(" ")[0]), entry.get("files")
        for name, count in (files if isinstance(files, dict) and rest else {}).items():  # it was told no place
            if isinstance(count, int) and abs(count) < 1000 and len(name) < 200 and name.isprintable():
                path = place / f"{name.replace('/', '_')}.f32" if name else place
                path.write_bytes(b"\0\0\x80\x3f" * count)
        said = entry.get("says", "no")
        return said if isinstance(said, str) else json.dumps(said)

    def end(self) -> None:
        """Nothing runs."""

    def last_words(self) -> str:
        return ""


def answers_target(root: Path) -> Target:
    checkpoint, script = write(root / "model", "meta", CONFIG, make_weights(CONFIG)), root / "script.json"
    script.write_text(json.dumps(SCRIPT))
    case = Case(str(checkpoint), ["fp32"], prompts=[PROMPT], prompt_lengths=[3], texts=["a"], corpus=["b"],
                dialogs=[[]], rope_positions=[0, 1], weights=True, vocab_size=6)  # fmt: skip

    def ask() -> None:
        with patch.object(command, "Program", Scripted):
            load = command.command_loader(f"cat {script}")
            record(load, case, TraceWriter(root / "trace"), lambda stage, done: None)

    return Target(script, mutate_json, ask)
