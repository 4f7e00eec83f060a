"""What a run leaves: final/, the adapter, curves, a summary, and the lines with which to go on.

finish(entry, setup, prepared, outcome, print)
"""

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from finetune.config import LORA_METHODS, TrainConfig
from finetune.curves import missing_plots
from finetune.data.files import Say, write_atomically
from finetune.gather import Whole, gathering
from finetune.lora import adapter_of, merged_when_read
from finetune.metrics import note_sample, read_metrics
from finetune.report import write_report
from finetune.sharding import rest_
from finetune.train import Outcome, Setup
from nanollama.checkpoint import convert, sniff
from nanollama.checkpoint.adapter import write_adapter
from nanollama.checkpoint.hf import write_hf
from nanollama.checkpoint.meta import write_meta

Step = tuple[str, str]  # what for, and what to type


def finish(setup: Setup, tokenizer: Path, outcome: Outcome, further: list[Step], say: Say) -> None:
    """The final model, the report, the verdict, and what to type next. All ranks bring their shards; the main one
    writes. further: lines of the entry's own.
    """
    out, config, world = setup.folder.path, setup.folder.config, setup.world
    rest_(setup.model)
    with gathering(dict(setup.model.named_parameters()), world) as whole:
        if whole is not None:
            write_model(setup, tokenizer, whole)
    text = setup.sample(setup.model) if world.is_main or world.mesh else ""
    if not world.is_main:
        return
    write_atomically(out / "summary.json", json.dumps(summary(outcome) | of_pairs(out, outcome), indent=2).encode())
    note_sample(out, outcome.progress.step, text)
    say(f"sample: {text}")
    for line in held_out_lines(outcome, of_pairs(out, outcome)):
        say(line)
    say(f"verdict: {outcome.verdict.text}")
    say(f"model: {out / 'final'}")
    if config.method in LORA_METHODS:
        say(f"adapter: {out / 'adapter'}, for --adapter beside --ckpt {config.ckpt}{_for_peft(config)}")
    try:
        say(f"report: {write_report(out)}{_without_curves(out)}")
    except ValueError as error:  # the model is what counts: no report is no failure
        say(f"no report: {error}")
    say("next:")
    for what, line in [*steps(out, config), *further]:
        say(f"  {what + ':':17}{line}")


def held_out_lines(outcome: Outcome, pairs: Mapping[str, float]) -> list[str]:
    """What the kept parameters make of the held-out data, in the units of what was learned."""
    score, yards = outcome.score, outcome.yards
    if yards:
        return [
            f"held-out bits per byte: {score.bpb:.4f}; a bigram model fitted on the training text: "
            f"{yards.bigram.bpb:.4f}",
            f"held-out nats per token: {score.loss:.4f}; the bigram model: {yards.bigram.loss:.4f}",
        ]
    told = [f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in pairs.items()]
    told = [f"{text} (nats a token, from where the run began)" if text.startswith("kl ") else text for text in told]
    return [
        f"held-out loss of a pair: {score.loss:.4f}; bits per byte of the chosen answers: {score.bpb:.4f}",
        *([f"held-out pairs: {', '.join(told)}"] if told else []),
    ]


def of_pairs(out: Path, outcome: Outcome) -> dict[str, float]:
    """What a run on pairs measured beside its loss at the step that is kept; nothing of other runs."""
    if outcome.yards:
        return {}
    lines = [e for e in read_metrics(out / "metrics.jsonl") if "val_loss" in e and e["step"] == outcome.step]
    known = ("step", "val_loss", "val_bpb")
    found = {name: value for line in lines[-1:] for name, value in line.items() if name not in known}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _without_curves(out: Path) -> str:
    """A word where the report lacks its pictures, which can be made later."""
    missing = missing_plots()
    return f" (without curves: {missing}, then python -m finetune.report {quoted(out)})" if missing else ""


def write_model(setup: Setup, tokenizer: Path, whole: Whole) -> None:
    """final/ with adapters merged in, final-hf/ where asked for, and the adapter.

    whole: gives a parameter in one piece.
    """
    config, out, model = setup.folder.config, setup.folder.path, setup.model
    weights = merged_when_read(model, whole)
    for folder, write in ((out / "final", write_meta), (out / "final-hf", write_hf)):
        if folder.exists():
            shutil.rmtree(folder)  # of this run, when it is resumed after its end
        if folder.name == "final" or config.export == "hf":
            write(folder, model.config, weights, tokenizer=tokenizer)
    if config.method in LORA_METHODS:
        base = base_for_peft(config, out)
        write_adapter(out / "adapter", adapter_of(model, whole), model.config, base=base_name(base))


def base_name(ckpt: str) -> str:
    """The checkpoint as an adapter names it, to be found from whatever folder: an absolute path, or a hub id."""
    local = Path(ckpt).expanduser()
    return str(local.resolve()) if ckpt and local.exists() else ckpt


def base_for_peft(config: TrainConfig, out: Path) -> str:
    """The base as peft can open it: with --export hf one of another format is written to OUT/base-hf/."""
    ckpt = config.ckpt or ""
    if config.export != "hf" or _opens_in_transformers(ckpt):
        return ckpt
    folder = out / "base-hf"
    if not (folder / "config.json").exists():
        convert(ckpt, folder, format="hf")
    return str(folder)


def _opens_in_transformers(ckpt: str) -> bool:
    local = Path(ckpt).expanduser()
    return not local.exists() or sniff(local) == "hf"


def _for_peft(config: TrainConfig) -> str:
    """A word where peft cannot open the base that the adapter names."""
    if config.export == "hf" or _opens_in_transformers(config.ckpt or ""):
        return ""
    return " (no Hugging Face folder: --export hf writes one, which peft opens)"


def steps(out: Path, config: TrainConfig) -> list[Step]:
    """How to check, export and serve the result."""
    final, gguf, name = quoted(out / "final"), quoted(out / "model.gguf"), quoted(out.name)
    found = [("check", f"python -m parity.check --ckpt {final}")]
    if config.export != "hf":
        hf = f"python -m nanollama convert {final} {quoted(out / 'final-hf')} --format hf"
        found.append(("for transformers", f"{hf}   (or --export hf with the run)"))
    modelfile = quoted(out / "Modelfile")
    return [
        *found,
        ("GGUF", f"python -m nanollama convert {final} {gguf} --format gguf"),
        ("llama.cpp", f"llama-server -m {gguf}"),
        ("Ollama", f"echo FROM ./model.gguf > {modelfile} && ollama create {name} -f {modelfile}"),
    ]


def quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def summary(outcome: Outcome) -> dict[str, float | str]:
    bigram = outcome.yards.bigram if outcome.yards else None
    return {
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "val_loss": outcome.score.loss,
        "val_bpb": outcome.score.bpb,
        **({"bigram_loss": bigram.loss, "bigram_bpb": bigram.bpb} if bigram else {}),
        "verdict": outcome.verdict.text,
    }
