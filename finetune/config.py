"""One frozen dataclass holds everything that a run depends on; the entries' flags are its fields.

Fields that are left open (0, or auto) are filled in by `resolve`, from the preset of `--init`, from the checkpoint, or
from the device, so that the config that a run saves is complete: what it says is what was done, and `--resume`
continues from it.

    python -m finetune.tinystories --help
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.errors import UserError
from nanollama.checkpoint.adapter import ATTENTION, LINEARS
from nanollama.model import ModelConfig

METHODS = ("full", "norms", "no_embeddings", "lora", "qlora")
LORA_METHODS = ("lora", "qlora")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --dtype and --weights
MESH = ("dp", "fsdp", "tp")  # processes along each dimension, see finetune/mesh.py
FROM_PRESET = ("seq_len", "batch_size", "lr", "max_steps", "vocab_size")  # 0: what the preset says
EVAL_TOKENS = 50_000
TWO_LENGTHS = "--epochs {0.epochs:g} and --max_steps {0.max_steps} together: each says how long to train"
WHEN = ("sample_every", "eval_every", "eval_tokens", "patience", "epochs")
# Peak rates for a trained checkpoint; measured on SmolLM2-135M (docs/LOG.md).
RATES = {"full": 2e-5, "no_embeddings": 2e-5, "norms": 1e-3, "lora": 2e-4, "qlora": 2e-4}


# What no machine of today has, and what would only end in a traceback of an allocation.
MOST = {"threads": 4096, "workers": 4096, "seq_len": 1 << 24, "batch_size": 1 << 20, "accumulate": 1 << 20}
MOST |= {"vocab_size": 1 << 20, "max_steps": 1 << 40, "warmup_steps": 1 << 40, "lora_rank": 1 << 16, "seed": 1 << 62}


@dataclass(frozen=True)
class TrainConfig:
    """Train a Llama on text: from scratch (--init) or from a checkpoint (--ckpt); packed rows, document mask."""

    # Data
    data: str = "auto"  # auto, tinystories, sample, a .txt, .md, .jsonl, .csv, .parquet, a folder, a hub id, shards
    val_data: str | None = None  # validate on this, and train on all of --data; else some documents are held out
    field: str = "text"  # the field or column of rows that holds the document
    separator: str = "<|endoftext|>"  # between the documents of a .txt or .md file; \n: one document a line
    on_bad: Literal["stop", "skip"] = "stop"  # what becomes of documents and dialogues that cannot be used
    tokenizer: str | None = None  # a tokenizer file; else the checkpoint's, else one is trained on the data
    vocab_size: int = 0  # words of the tokenizer that is trained on the data; 0: the preset's
    cache: str | None = None  # of downloads and token shards; else $NANOLLAMA_CACHE or nanollama/ in the user's caches
    workers: int = 0  # processes that tokenize; 0: one per core
    # Model
    ckpt: str | None = None  # start from this checkpoint (Meta or Hugging Face folder, hub id)
    init: str | None = None  # or from scratch: 260K, 15M, 42M, 110M, or a .json file of shapes
    method: Literal["full", "norms", "no_embeddings", "lora", "qlora"] = "full"  # which parameters are trained
    lora_rank: int = 8  # of the change that lora and qlora learn of each matrix
    lora_alpha: float = 16.0  # the change counts lora_alpha / lora_rank
    lora_scale: Literal["rank", "sqrt"] = "rank"  # sqrt (rsLoRA): lora_alpha / sqrt(lora_rank), for larger ranks
    dora: bool = False  # lora and qlora also train the length of each row of a matrix (DoRA)
    lora_plus: float = 1.0  # learning rate of B as a multiple of A's (LoRA+); 16 is its paper's
    lora_targets: str = "all"  # all, attention, or some of wq,wk,wv,wo,w1,w2,w3,output
    lora_dropout: float = 0.0  # on what the adapters read
    adapter: str | None = None  # lora and qlora: start from this adapter; its rank, alpha and targets are the run's
    chat_rows: Literal["auto", "reinit", "keep"] = "keep"  # chat words' rows become the mean; auto: untrained ones
    # Preferences (finetune.preference)
    loss: Literal["dpo", "ipo", "dpo_norm", "orpo"] = "dpo"  # dpo_norm, ipo: by length; orpo: without a reference
    beta: float = 0.0  # how far the margin of an answer counts; 0: 0.1, and 5 for dpo_norm
    # Distillation
    teacher: str | None = None  # a checkpoint with the same tokenizer, whose distributions are learned
    teacher_quantize: Literal["int8"] | None = None  # the teacher's weights as bytes
    temperature: float = 1.0  # of both distributions; above 1 shows more of what is unlikely
    distill_mix: float = 1.0  # share of the teacher in the loss; the rest is the labels'
    distill_on: Literal["labels", "all"] = "labels"  # where the teacher is followed; all: in prompts too
    # Run
    out: str | None = None  # folder of the run; else out/ENTRY-TIME
    resume: bool = False  # continue the run in --out, bit by bit
    max_steps: int = 0  # optimizer steps; 0: the preset's, or of --ckpt 3 epochs, at least 50 steps, at most 1000
    epochs: float = 0.0  # passes over the training data, in place of --max_steps; 0: as --max_steps says
    seq_len: int = 0  # tokens in a packed row; 0: the preset's, at most what the checkpoint was made for
    batch_size: int = 0  # rows in a micro-batch, on each rank; 0: the preset's
    accumulate: int = 1  # micro-batches in a step, on each rank
    doc_mask: Literal["on", "off"] = "on"  # off: attention and positions run across documents, for comparison only
    seed: int = 0  # of weights, data order and dropout
    # Optimizer
    lr: float = 0.0  # peak learning rate; 0: the preset's, of --ckpt the method's (docs/finetune.md)
    min_lr: float = 0.1  # at the end of the schedule, as a fraction of lr
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup
    warmup_steps: int = -1  # from 0 to lr; -1: a twentieth of max_steps, at most 1000
    weight_decay: float = 0.1  # of matrices; norms are never decayed
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    eps: float = 1e-8  # AdamW
    grad_clip: float = 1.0  # largest norm of all gradients together; 0: no clipping
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"  # 8bit: moments in bytes; muon: of the blocks' matrices
    ema: float = 0.0  # decay of an average of the weights, such as 0.999, validated too and kept as final/; 0: none
    optimizer_in_backward: bool = False  # update each parameter when its gradient is there; --grad_clip 0 alone
    dropout: float = 0.0  # on the embedding and on what attention and feed-forward add to the residual
    # Compute
    device: str = "auto"  # cpu, cuda, mps; auto: cuda where there is one
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the computation
    weights: Literal["fp32", "bf16"] = "fp32"  # bf16: states and computation too, every update rounded stochastically
    dp: int = 0  # copies of the model among the processes of torchrun, each on its own rows; 0: the rest of them
    fsdp: int = 0  # shards of weights, gradients and states, each on its own rows; 0: 1, or with --dp the rest
    tp: int = 0  # parts of each layer, on the same rows; 0: 1
    threads: int = 0  # CPU threads; 0: torch's choice; recorded, since another number rounds differently
    collective_timeout_s: int = 600  # of several ranks: seconds that one waits for the others before the run ends
    compile: bool = False  # torch.compile the model
    activation_checkpointing: bool = False  # recompute each block in the backward pass instead of keeping it
    offload_activations: bool = False  # with it: what is kept waits in the CPU's memory, not in the GPU's
    # What is seen and kept
    save_every: int = 100  # steps between checkpoints; there is one at the end and at SIGINT, SIGTERM as well
    save: Literal["whole", "sharded", "async"] = "whole"  # sharded: each rank writes its part; async: while it trains
    eval_every: int = 100  # steps between validation losses, beside those of step 0 and of the end; 0: those alone
    eval_tokens: int = 0  # validation tokens looked at, about; 0: 50,000, with --ckpt at most what the run trains on
    patience: int = 0  # stop after so many validations in a row that are no better than the best; 0: never
    keep: Literal["best", "last"] = "best"  # what becomes final/: the step of the lowest validation loss, or the last
    sample_every: int = 0  # steps between samples; 0: only at the end
    prompt: str = "Once upon a time"  # of the samples
    doctor: Literal["quick", "full", "off"] = "quick"  # look for ills before the first step; full: some 30 s
    tensorboard: bool = False  # also write TensorBoard events
    wandb: bool = False  # also log to Weights & Biases
    export: Literal["hf"] | None = None  # also write final-hf/, a Hugging Face folder

    def __post_init__(self) -> None:
        for name in ("accumulate", "save_every", "lora_rank", "collective_timeout_s"):
            _at_least(self, name, 1)
        rates = ("beta", "lr", "min_lr", "weight_decay", "grad_clip", "dropout")
        for name in (*rates, "seed", *MESH, *FROM_PRESET, *WHEN):
            _at_least(self, name, 0)
        for name in ("threads", "workers"):
            _at_least(self, name, 0)
        for name, most in MOST.items():
            _at_most(self, name, most)
        _at_least(self, "warmup_steps", -1)
        _check_optimizer(self)
        if self.seq_len == 1:
            raise UserError("--seq_len 1: expected at least 2, a token and its successor")
        if self.dropout >= 1:
            raise UserError(f"--dropout {self.dropout}: expected less than 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: expected at least 0 and less than 1")
        if self.adapter and self.method not in LORA_METHODS:
            raise UserError(f"--adapter goes with --method lora or qlora, not {self.method}")
        if self.ckpt and self.init:
            raise UserError("--ckpt and --init together: start from one of them")
        if self.optimizer_in_backward and (self.grad_clip or self.accumulate > 1):
            raise UserError(
                "--optimizer_in_backward frees each gradient before the others are known: add --grad_clip 0 and "
                "--accumulate 1"
            )
        if self.patience and not self.eval_every:
            raise UserError(f"--patience {self.patience} counts validations, and --eval_every 0 makes none: give both")
        if self.offload_activations and not self.activation_checkpointing:
            raise UserError("--offload_activations moves what --activation_checkpointing keeps: add that flag too")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: expected one of {', '.join(METHODS)}")


def _check_optimizer(config: TrainConfig) -> None:
    """Raises UserError for what does not go together."""
    if not 0 <= config.ema < 1:
        raise UserError(f"--ema {config.ema}: expected at least 0 and less than 1, such as 0.999")
    if not config.lora_plus > 0:
        raise UserError(f"--lora_plus {config.lora_plus}: expected a multiple above 0")
    if config.lora_plus != 1 and config.method not in LORA_METHODS:
        raise UserError(f"--lora_plus goes with --method lora or qlora, not {config.method}")
    if config.lora_scale != "rank" and (config.method not in LORA_METHODS or config.adapter):
        raise UserError("--lora_scale goes with --method lora or qlora and a new adapter")
    if config.dora and config.method not in LORA_METHODS:
        raise UserError(f"--dora goes with --method lora or qlora, not {config.method}")
    if config.optimizer == "muon" and config.method not in ("full", "no_embeddings"):
        raise UserError(f"--optimizer muon is for whole matrices: --method {config.method} trains none")
    if config.optimizer == "muon" and config.weights == "bf16":
        raise UserError("--optimizer muon has no stochastic rounding: leave --weights bf16 out")
    if config.optimizer_in_backward and (config.optimizer == "muon" or config.ema):
        raise UserError("--optimizer_in_backward goes neither with --optimizer muon nor with --ema")


def lora_targets(config: TrainConfig) -> tuple[str, ...]:
    """`--lora_targets` as short names of matrices. Raises UserError when it names none."""
    groups = {"all": LINEARS, "attention": ATTENTION}
    names = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
    if not names:
        raise UserError(
            "--lora_targets names no matrix: expected all, attention, or some of wq,wk,wv,wo,w1,w2,w3,output"
        )
    return tuple(dict.fromkeys(t for name in names for t in groups.get(name, (name,))))


def _at_least(config: TrainConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not value >= least:  # "not >=" also refuses nan
        raise UserError(f"--{name} {value}: expected at least {least}")


def _at_most(config: TrainConfig, name: str, most: int) -> None:
    value = getattr(config, name)
    if value > most:
        raise UserError(f"--{name} {value}: expected at most {most}")


@dataclass(frozen=True)
class Preset:
    """A shape of llama2.c with a recipe that suits it."""

    shape: dict[str, Any]
    vocab_size: int
    seq_len: int  # tokens
    batch_size: int
    lr: float
    max_steps: int


PRESETS = {
    "260K": Preset(
        {"dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 172}, 512, 512, 4, 1e-2, 300
    ),
    "15M": Preset(
        {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "hidden_dim": 768}, 32000, 256, 128, 1e-3, 20_000
    ),
    "42M": Preset(
        {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "hidden_dim": 1376}, 32000, 1024, 32, 1e-3, 40_000
    ),
    "110M": Preset(
        {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "hidden_dim": 2048}, 32000, 1024, 32, 6e-4, 80_000
    ),
}
# For --ckpt and --init FILE.json.
FROM_CHECKPOINT = Preset({}, 32000, 1024, 4, RATES["full"], 0)  # the data say how many steps
FROM_FILE = Preset({}, 32000, 256, 16, 1e-3, 1000)


def preset(config: TrainConfig) -> Preset:
    if config.ckpt:
        return FROM_CHECKPOINT
    if config.init in PRESETS:
        return PRESETS[config.init]
    if config.init and config.init.endswith(".json"):
        return FROM_FILE
    raise UserError(f"--init {config.init}: expected one of {', '.join(PRESETS)} or a .json file of shapes")


def resolve(config: TrainConfig, device: str, threads: int, context: int = 0) -> TrainConfig:
    """Everything that was left to the preset, the device or the machine gets its value; but `max_steps` stays 0 where
    it follows from the data (finetune/recipe.py). context: tokens that the checkpoint was made for. Raises UserError.
    """
    if config.epochs and config.max_steps:
        raise UserError(TWO_LENGTHS.format(config))
    if (config.ckpt or config.tokenizer) and config.vocab_size:
        brings = "--ckpt brings" if config.ckpt else "--tokenizer names"
        raise UserError(f"--vocab_size trains a tokenizer, but {brings} one: give one of them")
    if config.method in LORA_METHODS and not config.ckpt:
        raise UserError(f"--method {config.method} adapts a checkpoint: name it with --ckpt")
    if not config.ckpt and not config.init:
        config = replace(config, init="260K" if device == "cpu" else "15M")
    recipe, chosen = preset(config), asdict(config)
    if config.ckpt:
        chosen["lr"] = config.lr or RATES[config.method]
        chosen["seq_len"] = config.seq_len or min(recipe.seq_len, context or recipe.seq_len)
    for name in FROM_PRESET:
        if name != "max_steps" or not config.epochs:
            chosen[name] = chosen[name] or getattr(recipe, name)
    if chosen["max_steps"]:
        chosen["warmup_steps"] = warmup_steps(config, chosen["max_steps"])
    if not config.ckpt:
        chosen["eval_tokens"] = config.eval_tokens or EVAL_TOKENS
    if config.weights == "bf16":
        chosen["dtype"] = "bf16"
    return TrainConfig(**{**chosen, "device": device, "threads": threads})


def warmup_steps(config: TrainConfig, max_steps: int) -> int:
    return config.warmup_steps if config.warmup_steps >= 0 else min(1000, max_steps // 20)


def init_shape(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The architecture that `--init` names, for a tokenizer of `vocab_size` tokens. Raises UserError."""
    assert config.init is not None
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "rope_theta": 10_000.0,
        "tied": True,
        "max_seq_len": config.seq_len,
    }
    if config.init in PRESETS:
        return ModelConfig(**PRESETS[config.init].shape, **common)
    try:
        shape = json.loads(Path(config.init).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--init {config.init}: no such file; a preset is one of {', '.join(PRESETS)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--init {config.init}: not readable as JSON: {error}") from None
    known = {f.name: f for f in fields(ModelConfig)}
    required = {name for name, f in known.items() if f.default is MISSING} - common.keys()
    if not isinstance(shape, dict) or not required <= shape.keys():
        raise UserError(f"--init {config.init}: expected a JSON object with at least {', '.join(sorted(required))}")
    unknown = shape.keys() - known.keys() | shape.keys() & {"rope_scaling"}
    if unknown:
        raise UserError(f"--init {config.init}: unknown key {min(unknown)[:60]}; known are {', '.join(known)}")
    if shape.get("vocab_size", vocab_size) < vocab_size:
        raise UserError(
            f"--init {config.init}: vocab_size {shape['vocab_size']} is less than the tokenizer's {vocab_size}"
        )
    return ModelConfig(**{**common, **shape})


# Fields that may differ between a run and its continuation. FREE: they change what is seen and kept, and on how many
# ranks, not what is computed. GOING_ON: the rest of the run is another one, which is said and logged.
FREE = frozenset(
    ("resume", "out", "cache", "workers", "save_every", "eval_every", "eval_tokens", "sample_every", "prompt")
    + ("tensorboard", "wandb", "export", "patience", "collective_timeout_s", "dp", "fsdp", "tp", "save", "doctor")
)
GOING_ON = ("lr", "min_lr", "schedule", "weight_decay", "grad_clip", "max_steps", "epochs")


def merge_resumed(given: TrainConfig, saved: TrainConfig, defaults: TrainConfig) -> TrainConfig:
    """The run's own config, with what may differ as given. Raises UserError when another field was given and differs.

    A field that has its default value counts as not given.
    """
    chosen: dict[str, Any] = {"resume": True}
    for f in fields(TrainConfig):
        new, old, default = (getattr(c, f.name) for c in (given, saved, defaults))
        if new in (default, old):
            continue
        if f.name not in (*FREE, *GOING_ON):
            may = ", ".join(f"--{name}" for name in GOING_ON)
            raise UserError(
                f"--resume continues a run with --{f.name} {old}, not {new}: drop the flag, or start anew elsewhere "
                f"(what may change: {may})"
            )
        chosen[f.name] = new
    if given.epochs and given.max_steps:
        raise UserError(TWO_LENGTHS.format(given))
    if "epochs" in chosen:
        chosen["max_steps"] = 0  # which follows from the data
    elif "max_steps" in chosen:
        chosen["epochs"] = 0.0
    return replace(saved, **chosen)


def changes(saved: TrainConfig, now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (before, after) of what a resumed run does otherwise, or shows and keeps otherwise."""
    names = [f.name for f in fields(TrainConfig) if f.name not in ("resume", "out", "cache", "workers")]
    pairs = {name: (getattr(saved, name), getattr(now, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# Fields that mean something to one entry alone.
OWNED = {"loss": "preference", "beta": "preference"}


def refuse_foreign(entry: str, config: TrainConfig) -> None:
    """Raises UserError for a flag that this entry would not look at."""
    usual = TrainConfig()
    for name, owner in OWNED.items():
        if owner != entry and getattr(config, name) != getattr(usual, name):
            raise UserError(f"--{name} is finetune.{owner}'s: finetune.{entry} has no use for it")


def to_json(config: TrainConfig) -> dict[str, Any]:
    return asdict(config)


def from_json(saved: dict[str, Any], where: Path) -> TrainConfig:
    unknown = saved.keys() - {f.name for f in fields(TrainConfig)}
    if unknown:
        raise UserError(f"{where}: unknown key {min(unknown)[:60]}: it was written by another version")
    try:
        return TrainConfig(**saved)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
