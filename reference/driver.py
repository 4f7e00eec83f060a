"""Run a case on a reference implementation, whole or one layer at a time, and write its trace.

Both references fit one shape, `Engine`: a whole model with hooks on its modules, or its own blocks streamed from the
mapped files. Streaming is layer-major: a layer is read once and every sequence goes through it.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.files import Checkpoint, Config
from reference.files.weights import DTYPE_NAMES, DTYPES, Unusable
from reference.hooks import Recorder, Stream
from reference.objectives import run_objectives
from reference.protocol import (
    TRACE_SCHEMA,
    Case,
    Dialog,
    Taps,
    check_positions,
    check_sequences,
    chosen_positions,
    map_safetensors,
    progress,
    write_json,
)
from reference.training import Trainable, longest, run_training, torch_adamw

SMALL_BYTES = 2 << 30  # models up to this size run whole, on fresh copies of the weights
HEAD_ROWS = 16384  # of the vocabulary at a time; a multiple of 256, which leaves every bit of the logits as it is
MEMORY_SHARE = 0.8  # of the machine that a mapped model may take


class Text(Protocol):
    """The implementation's own tokenizer."""

    stop_ids: frozenset[int]
    sources: dict[str, str]  # of its ids of texts ("tokens") and of dialogs ("chat"), in words

    def encode(self, text: str, *, bos: bool) -> list[int]: ...
    def dialog(self, messages: Dialog) -> list[int] | None: ...
    def decode(self, ids: list[int]) -> str: ...


class Model(Protocol):
    """The whole implementation."""

    def logits(self, tokens: Tensor) -> Tensor: ...  # (1, T) -> (1, T, V)
    def greedy(self, prompt: list[int], max_new_tokens: int, stop_ids: frozenset[int] = ...) -> list[int]: ...


class Layers(Protocol):
    """The implementation one layer at a time."""

    def begin(self, tokens: Tensor) -> Stream: ...
    def block(self, layer: int) -> Callable[..., Tensor]: ...
    def norm(self) -> Callable[[Tensor], Tensor]: ...


class Engine(Protocol):
    name: str
    packages: tuple[str, ...]
    checkpoint: Checkpoint
    recorder: Recorder
    errata: tuple[str, ...]

    def config(self) -> Config: ...
    def logits_dtype(self, dtype: torch.dtype) -> torch.dtype: ...
    def rope(self, positions: list[int]) -> tuple[Tensor, Tensor]: ...
    def text(self, tokenizer: str | None) -> Text: ...
    def running(self) -> AbstractContextManager[None]: ...  # patches that the recording needs
    def whole(self, dtype: torch.dtype, max_tokens: int) -> Model: ...
    def layers(self, dtype: torch.dtype, max_tokens: int) -> Layers: ...
    def trainable(self, max_tokens: int) -> Trainable: ...


def fits_whole(case: Case, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the model runs whole at this dtype; otherwise it is streamed."""
    if case.stream != "auto":
        return case.stream == "never"
    size = checkpoint.bytes_at(dtype)
    if case.whole_bytes is not None:
        return size <= case.whole_bytes
    mapped = all(checkpoint.weights.is_mapped(name, dtype) for name in checkpoint.weights)
    return size <= SMALL_BYTES or (mapped and size <= MEMORY_SHARE * memory_bytes())


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def use_copies(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Small models get fresh memory: kernels may treat an unaligned view of a file differently, down to the bits."""
    return checkpoint.bytes_at(dtype) <= SMALL_BYTES


def set_numerics(threads: int) -> None:
    """Full-precision products everywhere: no TF32, no reduced-precision reductions."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def run_case(case: Case, engine: Engine, out: Path) -> None:
    """Write the trace of `case` under `out`."""
    set_numerics(case.threads)
    out.mkdir(parents=True, exist_ok=True)
    text = TextIds(case, engine)
    known = {"schema": TRACE_SCHEMA, "implementation": engine.name, **text.found}
    if case.record == "text":
        write_json(out / "trace.json", known | {"seconds_forward": 0.0, "notices": []})
        return
    prompts, notices = case.prompts or text.found["token_ids"], list(engine.checkpoint.notices)
    if prompts is None and case.spare_prompts is not None:
        prompts = case.spare_prompts
        notices.append(f"the prompts' ids are nanollama's own: {text.found['untexted']}")
    if prompts is None:
        raise Unusable(f"{case.checkpoint}: {text.found['untexted'] or 'neither prompts nor texts'}; give token ids")
    check_sequences(prompts, engine.checkpoint.config["vocab_size"])
    with engine.running(), torch.inference_mode():
        run = Run(case, engine, out)
        sequences, generated_by = run.generate(prompts)
        run.case = case = replace(case, positions=chosen_positions(case, sequences))
        check_positions(case.positions, sequences)
        for dtype in case.dtypes:
            run.forward(dtype, sequences)
        write_rope(out, *engine.rope(list(case.rope_positions)))
    training = None
    if case.training is not None:
        run._model = None  # let go of the last one first
        trainable = engine.trainable(longest(case.training))
        objectives = run_objectives(trainable, case.training, out)
        training = run_training(trainable, case.training, out, torch_adamw) | objectives
    write_json(
        out / "trace.json",
        known
        | {
            "versions": versions(engine.packages) | {"threads": str(case.threads), "device": case.device},
            "config": engine.config(),
            "sequences": sequences,
            "prompt_lengths": [len(prompt) for prompt in prompts],
            "positions": case.positions,
            "dtypes": {dtype: dtype for dtype in case.dtypes},
            "streamed": run.streamed,
            "generated_by": generated_by,
            "seconds_forward": run.seconds,
            "errata": list(engine.errata),
            "notices": notices,
            "weights": weight_hashes(engine.checkpoint) if case.weights else None,
            "training": training,
        },
    )
    progress("done", 1.0)


class TextIds:
    """What the implementation's own tokenizer makes of the texts of a case, as entries of its trace.

    untexted: why there is nothing. readings: the same texts by each of the checkpoint's files, this one's first.
    """

    def __init__(self, case: Case, engine: Engine):
        nothing = {"token_ids": None, "corpus_ids": None, "dialog_ids": None}
        self.found: dict[str, Any] = nothing | {"untexted": None, "readings": []}
        if case.texts is None and not case.corpus and not case.dialogs:
            return
        try:
            text = engine.text(case.tokenizer)
        except Unusable as error:
            self.found["untexted"] = str(error)
            return
        others = text.readings() if hasattr(text, "readings") else ()
        self.found["readings"] = [reading(case, one) for one in (text, *others)]
        self.found |= {key: self.found["readings"][0][key] for key in nothing}


def reading(case: Case, text: Text) -> dict[str, Any]:
    dialogs = [text.dialog(one) for one in case.dialogs]
    return {
        **text.sources,
        "token_ids": None if case.texts is None else [text.encode(one, bos=True) for one in case.texts],
        "corpus_ids": [text.encode(one, bos=False) for one in case.corpus],
        "dialog_ids": dialogs if any(ids is not None for ids in dialogs) else None,
    }


class Run:
    """The passes of one case, and what they took."""

    def __init__(self, case: Case, engine: Engine, out: Path):
        self.case, self.engine, self.out = case, engine, out
        self.seconds = 0.0
        self.streamed: dict[str, bool] = {}
        self._model: tuple[str, Model] | None = None  # the whole model that was built last

    def generate(self, prompts: list[list[int]]) -> tuple[list[list[int]], str | None]:
        """The prompts with their greedy continuation, made in the first dtype that fits whole."""
        checkpoint = self.engine.checkpoint
        whole = [name for name in self.case.dtypes if fits_whole(self.case, checkpoint, DTYPES[name])]
        if not self.case.max_new_tokens or not whole:
            return prompts, None
        longest = max(map(len, prompts)) + self.case.max_new_tokens
        model = self._whole(whole[0], longest)
        sequences = []
        for i, prompt in enumerate(prompts):
            progress(f"{whole[0]} greedy tokens, prompt {i + 1}/{len(prompts)}", self._share(0, i, len(prompts)))
            started = time.perf_counter()
            sequences.append(prompt + model.greedy(prompt, self.case.max_new_tokens))
            self.seconds += time.perf_counter() - started
        return sequences, whole[0]

    def forward(self, name: str, sequences: list[list[int]]) -> None:
        """Every sequence through the model at one dtype, recorded."""
        dtype = DTYPES[name]
        self.streamed[name] = not fits_whole(self.case, self.engine.checkpoint, dtype)
        taps = Taps(
            self.out / name,
            self.engine.checkpoint.config,
            lengths=[len(sequence) for sequence in sequences],
            positions=self.case.positions,
            dtype=dtype,
            logits_dtype=self.engine.logits_dtype(dtype),
            record=self.case.record,
        )
        tokens = [torch.tensor([sequence], device=self.case.device) for sequence in sequences]
        stage = self.case.dtypes.index(name) + 1
        if self.streamed[name]:
            self._model = None
            self._stream(name, tokens, taps, stage)
        else:
            self._run_whole(name, tokens, taps, stage)
        taps.finish()

    def _run_whole(self, name: str, tokens: list[Tensor], taps: Taps, stage: int) -> None:
        model = self._whole(name, max(len(one[0]) for one in tokens))
        for s, one in enumerate(tokens):
            progress(f"{name} sequence {s + 1}/{len(tokens)}", self._share(stage, s, len(tokens)))
            self.engine.recorder.sink = _sink(taps, s)
            started = time.perf_counter()
            logits = model.logits(one)
            self.seconds += time.perf_counter() - started
            self.engine.recorder.sink = None
            taps.put(s, "logits", logits)

    def _stream(self, name: str, tokens: list[Tensor], taps: Taps, stage: int) -> None:
        layers = self.engine.layers(DTYPES[name], max(len(one[0]) for one in tokens))
        n_layers = self.engine.checkpoint.config["n_layers"]
        started = time.perf_counter()
        streams = [layers.begin(one) for one in tokens]
        for s, stream in enumerate(streams):
            taps.put(s, "embed", stream.hidden)
        for layer in range(n_layers):
            progress(f"{name} layer {layer + 1}/{n_layers}", self._share(stage, layer, n_layers + 1))
            block = layers.block(layer)
            for s, stream in enumerate(streams):
                self.engine.recorder.sink = _sink(taps, s)
                stream.hidden = block(stream.hidden, *stream.args, **stream.kwargs)
            del block  # before the next one is read
            taps.close(f"layers.{layer}")
        self.engine.recorder.sink = None
        progress(f"{name} output head", self._share(stage, n_layers, n_layers + 1))
        norm = layers.norm()
        normed = [norm(stream.hidden) for stream in streams]
        for s, one in enumerate(normed):
            taps.put(s, "final_norm", one)
        self._stream_head(DTYPES[name], normed, taps)
        self.seconds += time.perf_counter() - started

    def _stream_head(self, dtype: torch.dtype, normed: list[Tensor], taps: Taps) -> None:
        """Logits by row blocks of the output matrix."""
        checkpoint = self.engine.checkpoint
        vocab_size = checkpoint.config["vocab_size"]
        for start in range(0, vocab_size, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, vocab_size)
            rows = checkpoint.weights.load(
                checkpoint.head, dtype, start=start, stop=stop, copy=use_copies(checkpoint, dtype)
            ).to(self.case.device)
            for s, one in enumerate(normed):
                taps.target(s, "logits")[:, start:stop].copy_(F.linear(one, rows)[0])

    def _whole(self, name: str, max_tokens: int) -> Model:
        if self._model is None or self._model[0] != name:
            self._model = None  # let go of the last one first
            self._model = (name, self.engine.whole(DTYPES[name], max_tokens))
        return self._model[1]

    def _share(self, stage: int, done: int, total: int) -> float:
        """Fraction of the run: generation is stage 0, each dtype is one more, all of the same weight."""
        return (stage + done / total) / (len(self.case.dtypes) + 1)


def _sink(taps: Taps, sequence: int) -> Callable[[str, Tensor], None]:
    return lambda name, value: taps.put(sequence, name, value)


def write_rope(out: Path, cos: Tensor, sin: Tensor) -> None:
    shape = (torch.float32, tuple(cos.shape))
    tensors = map_safetensors(out / "rope.safetensors", {"cos": shape, "sin": shape})
    tensors["cos"].copy_(cos)
    tensors["sin"].copy_(sin)


def weight_hashes(checkpoint: Checkpoint) -> dict[str, Any]:
    weights = checkpoint.weights
    return {
        name: {"shape": list(shape), "dtype": DTYPE_NAMES[weights.dtypes[name]], "crc32": weights.crc32(name)}
        for name, shape in weights.shapes.items()
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", *packages)}
