"""What every entry does around the loop: check the line, make the folder, prepare data, train, write the final model.

python -m finetune.tinystories          # one of the entries; the others are tinyshakespeare, text and chat
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finetune.build import Start, adapt_, build_model, open_start
from finetune.config import LORA_METHODS, TrainConfig, refuse_foreign, resolve
from finetune.data.files import write_atomically
from finetune.doctor.examine import examine_before
from finetune.errors import TrainingStopped, UserError
from finetune.evaluate import Score, bigram, whole
from finetune.gather import Whole, gathering
from finetune.launcher import folder_of_the_first_start, remember_folder, to_continue
from finetune.lock import held
from finetune.lora import adapter_of, merged_when_read
from finetune.mesh import mesh_sizes
from finetune.metrics import note_sample
from finetune.parallelize import World, default_device, open_world, world_size
from finetune.prepare.cache import Prepared, Say, cache_folder, prepare
from finetune.prepare.corpus import Source
from finetune.report import reported, write_report
from finetune.resume import RunFolder, begin, checkpoints, resume
from finetune.sharding import answering, refuse_unshardable, rest_
from finetune.train import Outcome, Setup, train
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
    recipe: Callable[[TrainConfig], TrainConfig] = lambda config: config  # fills what is left open, or refuses
    ready: Callable[[Setup, Say], Setup] = lambda setup, say: setup  # what else is made of model and data
    larger: tuple[str, ...] = ()  # flags of larger runs, printed at the end of a default run


def run_entry(entry: Entry) -> None:
    run_config(TrainConfig, lambda config: run(entry, config), defaults=entry.defaults)


def run(entry: Entry, given: TrainConfig) -> int:
    """The whole run; returns the exit code. Raises UserError, or another ValueError, for what the user can mend."""
    if begun := folder_of_the_first_start():
        given = replace(given, out=begun, resume=True)
    folder = resume(entry.name, given, TrainConfig(**entry.defaults)) if given.resume else None
    config = folder.config if folder else complete(entry, given)
    sizes = mesh_sizes(config.dp, config.fsdp, config.tp, world_size=world_size())
    refuse_unshardable(entry.name, config, sizes)
    with closing(open_world(config.device, sizes, config.collective_timeout_s)) as world:
        return world.guard(lambda: run_on(entry, config, folder, world))


def run_on(entry: Entry, config: TrainConfig, folder: RunFolder | None, world: World) -> int:
    """`run` on this rank, in the folder of the run to resume or in a new one."""
    out = Path(config.out or ".")
    try:
        folder = folder or world.from_main(lambda: begin(entry.name, config))
        out = folder.path
        if world.peers:
            world.peers.advice = lambda: f"; {_last_good(out)}: continue with {to_continue(entry.name, out)}"
            remember_folder(out)
        with held(out, world):
            return train_in(entry, folder, world)
    except TrainingStopped as stopped:
        _complain(world, f"{stopped}\ncontinue with: {to_continue(entry.name, out)}")
        return stopped.code
    except (OSError, CheckpointError) as error:
        if not _is_full_disk(error):
            raise
        _complain(world, f"error: {_full_disk(error, out)}")
        return 1


def complete(entry: Entry, given: TrainConfig) -> TrainConfig:
    """A new run's config, with what was left to the entry, the preset and the device filled in. Raises UserError."""
    device = default_device() if given.device == "auto" else given.device
    refuse_foreign(entry.name, given)
    return resolve(suggest(entry, entry.recipe(given)), device, given.threads or torch.get_num_threads())


def train_in(entry: Entry, folder: RunFolder, world: World) -> int:
    """Everything between the run's folder and its final model, on this rank."""
    config, say = folder.config, _sayer(world)
    torch.set_num_threads(config.threads)
    with folder.forgotten_if_refused(world), reported(folder.path, world, say):
        setup, prepared = _set_up(entry, folder, world, say)
        setup = entry.ready(setup, say)
        examine_before(setup, say, talks=entry.talks)
        outcome = train(setup)
        finish(entry, setup, prepared, outcome, say)
        world.wait_for_main()
        world.barrier()  # the main rank's end may be that of the store that the others ask
    return 0


def _set_up(entry: Entry, folder: RunFolder, world: World, say: Say) -> tuple[Setup, Prepared]:
    """The data, and the model with all that its config puts on it."""
    config = folder.config
    start = open_start(config)
    for notice in start.checkpoint.notices if start.checkpoint else ():
        say(notice)
    prepared = _prepare(entry, config, start, world, say)
    tokenizer = open_tokenizer(prepared.tokenizer, rows=start.rows)
    unread = start.checkpoint.weights if start.checkpoint and world.mesh and config.chat_rows == "keep" else None
    model = build_model(start, config, tokenizer.vocab_size, world.device if unread is None else torch.device("meta"))
    check_rows(prepared, tokenizer, model.config.vocab_size)
    describe(folder, prepared, model, world, say)
    adapt_(model, config, tokenizer, say)

    def draw(model: Transformer) -> str:
        with answering(model, world):
            return sample(model, tokenizer, config.prompt, talks=entry.talks)

    setup = Setup(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        train=prepared.train,
        val=prepared.val,
        fingerprint=prepared.fingerprint(),
        world=world,
        sample=draw,
        unread=unread,
    )
    return setup, prepared


def _is_full_disk(error: OSError | CheckpointError) -> bool:
    cause = error.__context__ if isinstance(error, CheckpointError) else error
    return isinstance(cause, OSError) and cause.errno in FULL_DISK


def _full_disk(error: OSError | CheckpointError, out: Path) -> str:
    """One line for a disk that takes no more, at whatever moment."""
    what = f"{error.filename or out}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return f"{what}; {_last_good(out)}: make room, then continue with --resume"


def _last_good(out: Path) -> str:
    left = checkpoints(out)
    return f"the last good checkpoint is {left[-1]}" if left else "no checkpoint was saved before"


def suggest(entry: Entry, given: TrainConfig) -> TrainConfig:
    """The entry's own recipe in place of the default preset's."""
    if given.ckpt or given.init or given.tokenizer:
        return given
    recipe: dict[str, Any] = {name: getattr(given, name) or value for name, value in entry.suggested.items()}
    return replace(given, **recipe)


def _prepare(entry: Entry, config: TrainConfig, start: Start, world: World, say: Say) -> Prepared:
    """The main rank prepares; then every rank opens what is there."""
    cache = cache_folder(config.cache)
    tokenizer = Path(config.tokenizer) if config.tokenizer else start.tokenizer
    if config.ckpt and tokenizer is None:
        raise UserError(f"--ckpt {config.ckpt}: has no tokenizer beside it: name one with --tokenizer")
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

    Raises UserError that names the first one that is used.
    """
    if tokenizer.vocab_size <= rows:
        return
    names = {i: name for name, i in tokenizer.special_ids.items()}
    for documents in (prepared.train, prepared.val):
        for i in range(len(documents.lengths)):
            used = int(whole(documents, i).max())
            if used >= rows:
                what = f"token {used}, {names.get(used) or tokenizer.decode([used])!r}"
                raise UserError(
                    f"the data uses {what}, and the model has rows for {rows:,} tokens only: name its own --tokenizer"
                )


def describe(folder: RunFolder, prepared: Prepared, model: Transformer, world: World, say: Say) -> None:
    """What is about to be done, in a few lines."""
    config, train, val = folder.config, prepared.train.lengths, prepared.val.lengths
    say(f"data: {prepared.name}: {len(train):,} documents, {train.sum():,} tokens; held out: {len(val):,} documents")
    long = int((train > config.seq_len).sum())
    if long:
        say(f"data: {long:,} documents are longer than --seq_len {config.seq_len}: cut in pieces, each with its BOS")
    parameters = sum(p.numel() for p in model.parameters())
    begun = config.ckpt or f"{config.init} from scratch"
    say(f"model: {begun}: {parameters:,} parameters, {prepared.vocabulary.size:,} words; --method {config.method}")
    if config.offload_activations and config.device == "cpu":
        say("--offload_activations: activations of a run on the CPU are in its memory already")
    ranks = f" on each of {world.data_size} ranks" if world.data_size > 1 else ""
    ranks += f", mesh {world.sizes}" if world.mesh else ""
    rows = f"{config.batch_size} x {config.accumulate} rows of {config.seq_len} tokens"
    say(f"run: {folder.path}: {config.max_steps} steps of {rows}{ranks}")


def finish(entry: Entry, setup: Setup, prepared: Prepared, outcome: Outcome, say: Say) -> None:
    """The final model, the report and what to type next. All ranks bring their shards; the main one writes."""
    out, world = setup.folder.path, setup.world
    rest_(setup.model)
    with gathering(dict(setup.model.named_parameters()), world) as whole:
        if whole is not None:
            write_model(setup, prepared.tokenizer, whole)
    text = setup.sample(setup.model) if world.is_main or world.mesh else ""
    if not world.is_main:
        return
    beaten = bigram(prepared.train, outcome.held_out, prepared.vocabulary.size)
    write_atomically(out / "summary.json", json.dumps(summary(outcome, beaten), indent=2).encode())
    note_sample(out, outcome.progress.step, text)
    say(f"sample: {text}")
    say(
        f"held-out bits per byte: {outcome.score.bpb:.4f}; a bigram model fitted on the training text: {beaten.bpb:.4f}"
    )
    say(f"held-out nats per token: {outcome.score.loss:.4f}; the bigram model: {beaten.loss:.4f}")
    say(f"model: {out / 'final'}")
    if setup.folder.config.method in LORA_METHODS:
        say(f"adapter: {out / 'adapter'}, for --adapter beside --ckpt {setup.folder.config.ckpt}")
    try:
        say(f"report: {write_report(out)}")
    except ValueError as error:  # the model is what counts: no picture is no failure
        say(f"no report: {error}")
    say("next:")
    for command in _next_commands(entry, out / "final", setup.folder.config.prompt):
        say(f"  {command}")


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
        write_adapter(out / "adapter", adapter_of(model, whole), model.config, base=base_name(config.ckpt or ""))


def _next_commands(entry: Entry, final: Path, prompt: str) -> list[str]:
    talk = f"chat --ckpt {final}" if entry.talks else f'generate --ckpt {final} --prompt "{prompt}"'
    larger = [f"{_command(entry)} {flags}" for flags in entry.larger]
    return [f"python -m nanollama {talk}", f"python -m parity.check --ckpt {final}", *larger]


def base_name(ckpt: str) -> str:
    """The checkpoint as an adapter names it, to be found from whatever folder: an absolute path, or a hub id."""
    local = Path(ckpt).expanduser()
    return str(local.resolve()) if ckpt and local.exists() else ckpt


def summary(outcome: Outcome, beaten: Score) -> dict[str, float]:
    return {
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "val_loss": outcome.score.loss,
        "val_bpb": outcome.score.bpb,
        "bigram_loss": beaten.loss,
        "bigram_bpb": beaten.bpb,
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


def only_set_up(entry: Entry, given: TrainConfig) -> Setup:
    """A run that will not begin, to be looked at; it needs `--out`, a folder to be thrown away. Raises UserError."""
    config = complete(entry, given)
    world = open_world(config.device)
    torch.set_num_threads(config.threads)
    return _set_up(entry, begin(entry.name, config), world, _sayer(world))[0]
