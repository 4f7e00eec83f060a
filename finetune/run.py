"""What every entry does around the loop: check the line, make the folder, prepare data, train, write the final model.

python -m finetune.tinystories          # one of the entries; the others are tinyshakespeare and text
"""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finetune.build import Start, adapt_, build_model, open_start
from finetune.config import LORA_METHODS, TrainConfig, from_json, merge_resumed, resolve, to_json
from finetune.data.files import write_atomically
from finetune.evaluate import Score, bigram, whole
from finetune.lora import adapter_of, merged_weights
from finetune.parallelize import World, default_device, open_world
from finetune.prepare.cache import Prepared, Say, cache_folder, prepare
from finetune.prepare.corpus import Source
from finetune.report import write_report
from finetune.resume import checkpoints
from finetune.train import Outcome, Setup, TrainingStopped, train
from nanollama.chat import encode_chat
from nanollama.checkpoint import CheckpointError
from nanollama.checkpoint.adapter import write_adapter
from nanollama.checkpoint.hf import write_hf
from nanollama.checkpoint.meta import write_meta
from nanollama.cli import run_config
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import Transformer
from nanollama.tokenizer import Tokenizer, open_tokenizer
from nanollama.vocabulary.write import fitting

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Entry:
    """One `python -m finetune.NAME`."""

    name: str
    find: Callable[[TrainConfig, Path, Say], Source | Path]  # (config, cache folder, say) -> the data
    defaults: dict[str, Any]  # in place of TrainConfig's
    suggested: dict[str, int] = field(default_factory=dict)  # of what is left open, where the start is left open too
    make: Callable[[TrainConfig, Path, Say], Prepared] | None = None  # (config, tokenizer, say), in place of shards
    talks: bool = False  # the model answers messages; else it continues text
    larger: tuple[str, ...] = ()  # flags of larger runs, printed at the end of a default run


def run_entry(entry: Entry) -> None:
    run_config(TrainConfig, lambda config: run(entry, config), defaults=entry.defaults)


def run(entry: Entry, given: TrainConfig) -> int:
    """The whole run; returns the exit code. Raises ValueError for what the user can mend."""
    saved = _saved_config(entry, given)
    device = (saved or given).device
    device = default_device() if device == "auto" else device
    world = open_world(device)
    try:
        config = saved or resolve(suggest(entry, given), device, given.threads or torch.get_num_threads())
        torch.set_num_threads(config.threads)
        out = Path(world.from_main(lambda: str(_open_out(entry, config))))
        try:
            return _run(entry, replace(config, out=str(out)), out, world)
        except ValueError:
            _forget_unbegun(out, world)
            raise
    except TrainingStopped as stopped:
        again = f"{_command(entry)} --out {given.out or out} --resume"
        _complain(world, f"{stopped}\ncontinue with: {again}")
        return stopped.code
    except (OSError, CheckpointError) as error:
        cause = error.__context__ if isinstance(error, CheckpointError) else error
        if not isinstance(cause, OSError) or cause.errno not in FULL_DISK:
            raise
        _complain(world, f"error: {_full_disk(error, Path(given.out or '.'))}")
        return 1
    finally:
        world.close()


def _full_disk(error: OSError | CheckpointError, out: Path) -> str:
    """One line for a disk that takes no more, at whatever moment."""
    what = f"{error.filename or out}: {error.strerror}" if isinstance(error, OSError) else str(error)
    left = checkpoints(out)
    good = f"the last good checkpoint is {left[-1]}" if left else "no checkpoint was saved before"
    return f"{what}; {good}: make room, then continue with --resume"


def _run(entry: Entry, config: TrainConfig, out: Path, world: World) -> int:
    say = _sayer(world)
    start = open_start(config)
    for notice in start.checkpoint.notices if start.checkpoint else ():
        say(notice)
    prepared = _prepare(entry, config, start, world, say)
    tokenizer = open_tokenizer(prepared.tokenizer, rows=start.rows)
    model = build_model(start, config, tokenizer.vocab_size, world.device)
    check_rows(prepared, tokenizer, model.config.vocab_size)
    describe(config, prepared, model, out, world, say)
    adapt_(model, config, tokenizer, say)
    setup = Setup(
        config=config,
        model=model,
        tokenizer=tokenizer,
        train=prepared.train,
        val=prepared.val,
        fingerprint=prepared.fingerprint(),
        out=out,
        world=world,
        sample=lambda m: sample(m, tokenizer, config.prompt, talks=entry.talks),
    )
    outcome = train(setup)
    if world.is_main:
        finish(entry, setup, prepared, outcome, say)
    world.barrier()
    return 0


def suggest(entry: Entry, given: TrainConfig) -> TrainConfig:
    """The entry's own recipe in place of the default preset's."""
    if given.ckpt or given.init or given.tokenizer:
        return given
    chosen = to_json(given)
    return TrainConfig(**{**chosen, **{name: chosen[name] or value for name, value in entry.suggested.items()}})


def _saved_config(entry: Entry, given: TrainConfig) -> TrainConfig | None:
    """The config of the run that `--resume` continues."""
    if not given.resume:
        return None
    if given.out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    path = Path(given.out) / "config.json"
    if not path.exists():
        raise ValueError(
            f"--out {given.out}: holds no run to resume (config.json is missing): drop --resume to start one"
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.pop("entry") != entry.name:
        raise ValueError(f"--out {given.out}: holds a run of another entry: resume it with the command that began it")
    world_size = saved.pop("world_size")
    if world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(f"--resume continues a run of {world_size} processes: start as many")
    return merge_resumed(given, from_json(saved, path), TrainConfig(**entry.defaults))


def _open_out(entry: Entry, config: TrainConfig) -> Path:
    """The run's folder, with config.json in it. Raises ValueError when it holds something else."""
    out = Path(config.out or f"out/{entry.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not config.resume:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file")
        inside = [p.name for p in out.iterdir() if not p.name.endswith(".partial")] if out.exists() else []
        if "config.json" in inside:
            raise ValueError(f"--out {out}: holds a run already: add --resume to continue it, or choose another folder")
        if inside:
            raise ValueError(f"--out {out}: is not empty (it holds {min(inside)}): choose another folder")
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        saved = {"entry": entry.name, "world_size": world_size, **to_json(replace(config, out=str(out)))}
        write_atomically(out / "config.json", (json.dumps(saved, indent=2) + "\n").encode())
    return out


def _forget_unbegun(out: Path, world: World) -> None:
    """A run that was refused before its first step leaves no folder behind, so that the mended line can be typed."""
    if world.is_main and [path.name for path in out.iterdir()] == ["config.json"]:
        (out / "config.json").unlink()
        out.rmdir()


def _prepare(entry: Entry, config: TrainConfig, start: Start, world: World, say: Say) -> Prepared:
    """The main rank prepares; then every rank opens what is there."""
    cache = cache_folder(config.cache)
    tokenizer = Path(config.tokenizer) if config.tokenizer else start.tokenizer
    if config.ckpt and tokenizer is None:
        raise ValueError(f"--ckpt {config.ckpt}: has no tokenizer beside it: name one with --tokenizer")
    if start.rows and tokenizer:
        fitting(open_tokenizer(tokenizer).vocabulary, start.rows)  # before an hour of tokenizing with another model's
    source = world.from_main(lambda: entry.find(config, cache, say))
    if entry.make is not None:
        assert tokenizer is not None, "an entry that makes its documents finds no data without a checkpoint"
        return entry.make(config, tokenizer, say)

    def opened(speak: Say) -> Prepared:
        return prepare(
            source,
            cache=cache,
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
            workers=config.workers or os.cpu_count() or 1,
            say=speak,
        )

    world.from_main(lambda: opened(say).name)
    return opened(lambda text: None)


def check_rows(prepared: Prepared, tokenizer: Tokenizer, rows: int) -> None:
    """A tokenizer may have more tokens than the model has rows, as long as the data uses none of those.

    Raises ValueError that names the first one that is used.
    """
    if tokenizer.vocab_size <= rows:
        return
    names = {i: name for name, i in tokenizer.special_ids.items()}
    for documents in (prepared.train, prepared.val):
        for i in range(len(documents.lengths)):
            used = int(whole(documents, i).max())
            if used >= rows:
                what = f"token {used}, {names.get(used) or tokenizer.decode([used])!r}"
                raise ValueError(
                    f"the data uses {what}, and the model has rows for {rows:,} tokens only: name its own --tokenizer"
                )


def describe(config: TrainConfig, prepared: Prepared, model: Transformer, out: Path, world: World, say: Say) -> None:
    train, val = prepared.train.lengths, prepared.val.lengths
    say(f"data: {prepared.name}: {len(train):,} documents, {train.sum():,} tokens; held out: {len(val):,} documents")
    long = int((train > config.seq_len).sum())
    if long:
        say(f"data: {long:,} documents are longer than --seq_len {config.seq_len}: cut in pieces, each with its BOS")
    count = sum(p.numel() for p in model.parameters())
    begun = config.ckpt or f"{config.init} from scratch"
    say(f"model: {begun}: {count:,} parameters, {prepared.vocabulary.size:,} words; --method {config.method}")
    if config.offload_activations and config.device == "cpu":
        say("--offload_activations: activations of a run on the CPU are in its memory already")
    ranks = f" on each of {world.size} ranks" if world.size > 1 else ""
    rows = f"{config.batch_size} x {config.accumulate} rows of {config.seq_len} tokens"
    say(f"run: {out}: {config.max_steps} steps of {rows}{ranks}")


def finish(entry: Entry, setup: Setup, prepared: Prepared, outcome: Outcome, say: Say) -> None:
    """The final model, the report and what to type next."""
    config, out, model = setup.config, setup.out, setup.model
    weights = merged_weights(model)
    for folder, write in ((out / "final", write_meta), (out / "final-hf", write_hf)):
        if folder.exists():
            shutil.rmtree(folder)  # of this run, when it is resumed after its end
        if folder.name == "final" or config.export == "hf":
            write(folder, model.config, weights, tokenizer=prepared.tokenizer)
    if config.method in LORA_METHODS:
        write_adapter(out / "adapter", adapter_of(model), model.config, base=base_name(config.ckpt or ""))
    base = bigram(prepared.train, outcome.held_out, prepared.vocabulary.size)
    write_atomically(out / "summary.json", json.dumps(summary(outcome, base), indent=2).encode())
    say(f"sample: {setup.sample(model)}")
    say(f"held-out bits per byte: {outcome.score.bpb:.4f}; a bigram model fitted on the training text: {base.bpb:.4f}")
    say(f"held-out nats per token: {outcome.score.loss:.4f}; the bigram model: {base.loss:.4f}")
    say(f"model: {out / 'final'}")
    if config.method in LORA_METHODS:
        say(f"adapter: {out / 'adapter'}, for --adapter beside --ckpt {config.ckpt}")
    try:
        say(f"curves: {write_report(out)}")
    except ValueError as error:  # the model is what counts: no picture is no failure
        say(f"no curves: {error}")
    say("next:")
    if entry.talks:
        say(f"  python -m nanollama chat --ckpt {out / 'final'}")
    else:
        say(f'  python -m nanollama generate --ckpt {out / "final"} --prompt "{config.prompt}"')
    say(f"  python -m parity.check --ckpt {out / 'final'}")
    for flags in entry.larger:
        say(f"  {_command(entry)} {flags}")


def base_name(ckpt: str) -> str:
    """The checkpoint as an adapter names it, to be found from whatever folder: an absolute path, or a hub id."""
    local = Path(ckpt).expanduser()
    return str(local.resolve()) if ckpt and local.exists() else ckpt


def summary(outcome: Outcome, base: Score) -> dict[str, float]:
    return {
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "val_loss": outcome.score.loss,
        "val_bpb": outcome.score.bpb,
        "bigram_loss": base.loss,
        "bigram_bpb": base.bpb,
    }


def sample(model: Transformer, tokenizer: Tokenizer, prompt: str, *, talks: bool = False) -> str:
    """The prompt and what the model makes of it; talks: as the answer to a user's message."""
    was_training = model.training
    model.eval()
    text = prompt + " -> " * talks
    try:
        message = [{"role": "user", "content": prompt}]
        ids = encode_chat(message, tokenizer, add_generation_prompt=True).ids if talks else prompt
        sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=0)
        for event in Llama(model, tokenizer).generate([ids], sampling):
            text += event.text
    except ValueError as error:  # a prompt that the model cannot read, a row without a token: the run goes on
        text += f" [the sample ends here: {error}]"
    model.train(was_training)
    return text


def _sayer(world: World) -> Say:
    return lambda text: print(text, flush=True) if world.is_main else None


def _complain(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


def _command(entry: Entry) -> str:
    return f"python -m finetune.{entry.name}"
