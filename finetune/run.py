"""What every entry does around the loop: check the line, make the folder, prepare data, train, write the final model.

python -m finetune.tinystories          # one of the entries; the others are tinyshakespeare, text and chat
"""

import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finetune import interrupts
from finetune.build import Start, adapt_, build_model, open_start
from finetune.closing import Step, finish, quoted
from finetune.config import TrainConfig, changes, refuse_foreign, resolve
from finetune.data.documents import whole
from finetune.distill import check_teaching, with_teacher
from finetune.doctor.examine import examine_before
from finetune.errors import FULL_DISK, TrainingStopped, UserError
from finetune.launcher import folder_of_the_first_start, remember_folder, to_continue
from finetune.lock import held
from finetune.mesh import mesh_sizes
from finetune.parallelize import World, default_device, open_world, world_size
from finetune.prepare.cache import Prepared, Say, cache_folder, prepare
from finetune.prepare.corpus import Source, text_files
from finetune.recipe import settle
from finetune.report import reported
from finetune.resume import RunFolder, begin, checkpoints, resume, saved_config
from finetune.sharding import answering, refuse_unshardable
from finetune.train import Setup, train
from nanollama.chat import encode_chat
from nanollama.checkpoint import CheckpointError, open_checkpoint
from nanollama.cli import run_config
from nanollama.generation.llama import Llama, Sampling
from nanollama.model import Transformer
from nanollama.tokenizer import Tokenizer, open_tokenizer
from nanollama.vocabulary.write import fitting

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
    onward: tuple[Step, ...] = ()  # what may be done next with the model: (what for, a module and its flags)


def run_entry(entry: Entry) -> None:
    interrupts.hand_over_()
    run_config(TrainConfig, lambda config: run(entry, config), defaults=entry.defaults)


def run(entry: Entry, given: TrainConfig) -> int:
    """The whole run; returns the exit code. Raises UserError, or another ValueError, for what the user can mend."""
    try:
        if begun := folder_of_the_first_start():
            given = replace(given, out=begun, resume=True)
        folder = resume(entry.name, given, TrainConfig(**entry.defaults)) if given.resume else None
        config = folder.config if folder else complete(entry, given)
        sizes = mesh_sizes(config.dp, config.fsdp, config.tp, world_size=world_size())
        refuse_unshardable(entry.name, config, sizes)
        opened = open_world(config.device, sizes, config.collective_timeout_s)
    except KeyboardInterrupt:
        print(interrupts.WORD, file=sys.stderr)
        return 130
    with closing(opened) as world:
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
    except KeyboardInterrupt:
        again = f"interrupted; continue with: {to_continue(entry.name, out)}"
        _complain(world, again if checkpoints(out) else interrupts.WORD)
        if world.peers:
            raise
        return 130
    except (OSError, CheckpointError) as error:
        if not _is_full_disk(error):
            raise
        _complain(world, f"error: {_full_disk(error, out)}")
        return 1


def complete(entry: Entry, given: TrainConfig) -> TrainConfig:
    """A new run's config, with what was left to the entry, the preset, the checkpoint and the device filled in.

    Raises UserError.
    """
    device = default_device() if given.device == "auto" else given.device
    refuse_foreign(entry.name, given)
    check_teaching(entry.name, given)
    context = open_checkpoint(given.ckpt).config.max_seq_len if given.ckpt and not given.seq_len else 0
    threads = given.threads or torch.get_num_threads()
    return resolve(suggest(entry, entry.recipe(given)), device, threads, context)


def train_in(entry: Entry, folder: RunFolder, world: World) -> int:
    """Everything between the run's folder and its final model, on this rank; returns the exit code."""
    say = _sayer(world)
    torch.set_num_threads(folder.config.threads)
    with folder.forgotten_if_refused(world), reported(folder.path, world, say):
        setup, prepared = _set_up(entry, folder, world, say)
        setup = settled(entry.ready(setup, say))
        examine_before(setup, say, talks=entry.talks)
        setup = with_teacher(setup, say)
        outcome = train(setup)
        finish(setup, prepared.tokenizer, outcome, _further(entry, setup.folder), say)
        world.wait_for_main()
        world.barrier()  # the main rank's end may be that of the store that the others ask
    return int(outcome.verdict.is_worse)


def only_set_up(entry: Entry, given: TrainConfig) -> Setup:
    """A run that will not begin, to be looked at; it needs `--out`, a folder to be thrown away. Raises UserError."""
    config = complete(entry, given)
    world = open_world(config.device)
    torch.set_num_threads(config.threads)
    return settled(_set_up(entry, begin(entry.name, config), world, _sayer(world))[0])


def settled(setup: Setup) -> Setup:
    """With everything in its config that follows from the data, and with what is otherwise than before."""
    config, was = setup.folder.config, saved_config(setup.folder)
    masked = config.doc_mask == "on"
    packer = setup.objective.packer(setup.train, config.seq_len, seed=config.seed, doc_mask=masked)
    config = settle(config, packer, config.batch_size * setup.micro_batches)
    changed = changes(was, config) if config.resume else {}
    return replace(setup, folder=replace(setup.folder, config=config), changed=changed)


def _further(entry: Entry, folder: RunFolder) -> list[Step]:
    """What to do with the entry's model: talk to it, train it on, train a larger one."""
    final, prompt = quoted(folder.path / "final"), quoted(folder.config.prompt)
    talk = f"chat --ckpt {final}" if entry.talks else f"generate --ckpt {final} --prompt {prompt}"
    onward = [(what, f"python -m {line} --ckpt {final}") for what, line in entry.onward]
    larger = [("a larger one", f"python -m finetune.{entry.name} {flags}") for flags in entry.larger]
    return [("talk to it", f"python -m nanollama {talk}"), *onward, *larger]


def _set_up(entry: Entry, folder: RunFolder, world: World, say: Say) -> tuple[Setup, Prepared]:
    """The data, and the model with all that its config puts on it."""
    config = folder.config
    start = open_start(config)
    for notice in start.checkpoint.notices if start.checkpoint else ():
        say(notice)
    prepared = _prepare(entry, folder, start, world, say)
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
        tokenizer_file=str(prepared.tokenizer),
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


def _prepare(entry: Entry, folder: RunFolder, start: Start, world: World, say: Say) -> Prepared:
    """The main rank prepares; then every rank opens what is there."""
    config = folder.config
    cache = cache_folder(config.cache)
    tokenizer = Path(config.tokenizer) if config.tokenizer else start.tokenizer or _tokenizer_of(folder)
    if config.ckpt and tokenizer is None:
        raise UserError(f"--ckpt {config.ckpt}: has no tokenizer beside it: name one with --tokenizer")
    if start.rows and tokenizer:
        fitting(open_tokenizer(tokenizer).vocabulary, start.rows)  # before an hour of tokenizing with another model's
    source = world.from_main(lambda: _find(entry, config, cache, say))
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


def _tokenizer_of(folder: RunFolder) -> Path | None:
    """The one that a run trained on its data when it began: documents that came later must not make another."""
    state = folder.saved_state() if folder.config.resume else None
    path = Path(state.get("tokenizer") or "") if state else Path()
    return path if path.is_file() else None


def _find(entry: Entry, config: TrainConfig, cache: Path, say: Say) -> Source | Path:
    """The entry's data, with `--val_data` beside them where that is given."""
    source = entry.find(config, cache, say)
    if not config.val_data or entry.make is not None:
        return source
    if isinstance(source, Path):
        raise UserError(f"--val_data {config.val_data}: {source} is a folder of shards, which has its own")
    return replace(source, val=text_files(Path(config.val_data), "--val_data"))


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
    say(f"run: {folder.path}: steps of {rows}{ranks}")


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
