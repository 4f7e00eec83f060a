"""OUT/report.html: a run to look at, in one file: curves, validation, samples, what the doctor saw, what differs from
the defaults, and the machine. Written when a run ends, interrupted or not; for one that was killed, by hand:

$ python -m finetune.report out/RUN
out/RUN/report.html
"""

import html
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune.config import TrainConfig, resolve
from finetune.curves import picture
from finetune.data.files import Say, write_atomically
from finetune.doctor import examine
from finetune.doctor.page import STYLE, section
from finetune.errors import TrainingStopped, UserError
from finetune.metrics import SAMPLES, read_metrics
from finetune.parallelize import World
from finetune.restore import check_config_types, read_file
from nanollama import __version__
from nanollama.cli import run
from nanollama.gate import CheckpointError, shown
from nanollama.gate.documents import read_bytes

NAME = "report.html"
ENVIRONMENT = "environment.json"
TABLES = """
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .2em .8em; text-align: left; vertical-align: top; }
tr + tr { border-top: 1px solid #ddd; } tr.differs td { background: #fff4d6; } td.sample { white-space: pre-wrap; }
svg { max-width: 100%; height: auto; } .state { padding: .2em .6em; border-radius: 4px; background: #eee; }
"""


@contextmanager
def reported(out: Path, world: World, say: Say) -> Iterator[None]:
    """Around a run: its machine is written down, and a run that stops early gets its report all the same."""
    if world.is_main:
        write_atomically(out / ENVIRONMENT, (json.dumps(environment(world), indent=1) + "\n").encode())
    try:
        yield
    except (TrainingStopped, KeyboardInterrupt):
        with suppress(OSError, ValueError):  # why it stopped is what counts
            if world.is_main and (out / "metrics.jsonl").exists():
                say(f"report: {write_report(out)}")
        raise


def environment(world: World) -> dict[str, str]:
    """What the numbers of a run may depend on, beside its config."""
    device = str(world.device)
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    return {
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "nanollama": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "processes": str(world.size),
        "threads": str(torch.get_num_threads()),
        "command": " ".join(sys.argv),
    }


def write_report(out: Path) -> Path:
    """Make the report of what a run's folder holds. Raises UserError where it holds no run."""
    path = out / NAME
    write_atomically(path, report(out).encode())
    return path


def report(out: Path) -> str:
    """The whole page; everything that comes from the run is escaped."""
    saved, lines = read_config(out), read_metrics(out / "metrics.jsonl")
    done = max((line["step"] for line in lines if "loss" in line), default=0)
    last = saved["max_steps"]
    state = "finished" if (out / "summary.json").exists() and done >= last else "stopped early"
    doctor = examine.read(out)
    parts = [
        f"<h1>{html.escape(out.name)}</h1>",
        f'<p><span class="state" data-state="{state}">{state} at step {done:,} of {last:,}</span></p>',
        _summary(out),
        f"<h2>Curves</h2>{picture({out.name: lines})}",
        f"<h2>Validation</h2>{_validation(lines)}",
        f"<h2>Samples</h2>{_samples(read_metrics(out / SAMPLES))}",
        _doctor(doctor) if doctor else "",
        f"<h2>Config</h2>{_config(saved)}",
        f"<h2>Machine</h2>{_machine(out)}",
    ]
    style = f"<style>{STYLE}{TABLES}</style>"
    head = f'<meta charset="utf-8"><title>{html.escape(out.name)}</title>{style}'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(parts)}</body></html>\n'


def read_config(out: Path) -> dict[str, Any]:
    """config.json of a run. Raises UserError."""
    path = out / "config.json"
    if not path.exists():
        raise UserError(f"{out}: holds no run (config.json is missing): name the folder that --out named")
    found = read_file(path)
    if "max_steps" not in found:
        raise UserError(f"{path}: not a run's config")
    check_config_types(found, path)
    return found


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json, in which a run that diverged has numbers that strict JSON does not know. Raises UserError."""
    path = out / "summary.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(read_bytes(path))
    except CheckpointError as error:
        raise UserError(str(error)) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON: it is not as a run wrote it") from None
    scores = [found.get(key) for key in ("val_loss", "val_bpb")] if isinstance(found, dict) else [found]
    if not all(score is None or type(score) is float for score in scores):
        raise UserError(f"{path}: is not as a run wrote it: {shown(found)}")
    return found


def defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields would be, had only the start and the method been chosen."""
    chosen = {name: saved[name] for name in ("ckpt", "init", "tokenizer", "method") if name in saved}
    try:
        return asdict(resolve(TrainConfig(**chosen), saved["device"], saved["threads"]))
    except (ValueError, TypeError, KeyError):  # a config that no run wrote is shown beside the plain defaults
        return asdict(TrainConfig())


def differing(saved: Mapping[str, Any]) -> list[str]:
    """Names of the fields that are not as they would be by default; what is only seen or kept counts, too."""
    usual, left_open = defaults(saved), ("resume", "out", "max_steps" if not saved.get("max_steps") else "")
    return [name for name, value in saved.items() if name in usual and value != usual[name] and name not in left_open]


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = (), marked: Sequence[int] = ()) -> str:
    """Escaped; rows with a number in `marked` stand out."""
    top = f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>" if head else ""
    made = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        made.append(f'<tr class="differs">{cells}</tr>' if number in marked else f"<tr>{cells}</tr>")
    return f"<table>{top}{''.join(made)}</table>"


def _summary(out: Path) -> str:
    found = read_summary(out)
    verdict = f"<p><b>{html.escape(str(found.pop('verdict')))}</b></p>" if "verdict" in found else ""
    return verdict + (table(list(found.items())) if found else "")


def _validation(lines: Sequence[Mapping[str, Any]]) -> str:
    """A row for each validation; what was measured beside loss and bits per byte has columns of its own."""
    scores = [line for line in lines if line.get("val_loss") is not None and line.get("val_bpb") is not None]
    if not scores:
        return "<p>none yet</p>"
    names = [name for name, value in scores[0].items() if name != "step" and isinstance(value, int | float)]
    of_pairs = any("margin" in line for line in lines)
    words = {"val_loss": "loss of a pair" if of_pairs else "nats per token", "val_bpb": "bits per byte"}
    head = [words.get(name, name.removeprefix("val_").replace("_", " ")) for name in names]
    rows = [(line["step"], *(_digits(line.get(name)) for name in names)) for line in scores]
    return table(rows, ("step", *head))


def _digits(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _samples(lines: Sequence[Mapping[str, Any]]) -> str:
    found = {line["step"]: line["sample"] for line in lines if "sample" in line}
    made = table(list(found.items()), ("step", "sample")).replace("<td>", '<td class="sample">')
    return made if found else "<p>none yet (--sample_every)</p>"


def _doctor(doctor: Mapping[str, Any]) -> str:
    return section(doctor["findings"], doctor["facts"], doctor["first"])


def _config(saved: Mapping[str, Any]) -> str:
    usual, names = defaults(saved), set(differing(saved))
    rows = [(f"--{name}", value, usual.get(name, "")) for name, value in saved.items()]
    marked = [number for number, name in enumerate(saved) if name in names]
    return table(rows, ("flag", "this run", "default"), marked)


def _machine(out: Path) -> str:
    path = out / ENVIRONMENT
    return table(list(read_file(path).items())) if path.exists() else "<p>not known</p>"


def main(
    out: Path,  # the folder of a run
) -> None:
    """Write OUT/report.html anew, of a run that was killed or still goes on."""
    print(write_report(out))


if __name__ == "__main__":
    run(main)
