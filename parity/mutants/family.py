"""The checkpoint family that the mutants run on: small, seeded, and each member shows what the others cannot.

gqa          Llama 3.1's features: scaled RoPE, grouped heads, an untied head, an eps that is no code's default
tied         Llama 3.2's: a tied head, scaling factor 32
train        trained on, in fp32: loss, gradients, optimizer steps
hf           the Hugging Face format: permuted q and k rows, rope_type
llama3-text  the real Llama 3 tokenizer over a toy model; llama2-text a sentencepiece one
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from parity.candidates.nano.checkpoint import describe
from parity.contract import Case
from parity.measure.evidence import Evidence
from parity.run.prompts import BUILT_IN, CORPUS, DIALOGS, LONG, Prompts, seeded
from parity.run.request import ROPE_POSITIONS, Plan, Request, plan
from parity.run.runner import Runner
from parity.run.training import training_case
from parity.synth.checkpoint import llama3_tokenizer, write_hf, write_meta
from parity.synth.shapes import Shape

DTYPES = ("fp32", "bf16", "fp16")
NEW_TOKENS = 8
_GQA = Shape(128, 2, 8, 2, 352, vocab_size=512, norm_eps=2e-5, rope_factor=8.0, multiple_of=32, context=131_072)
_TOY = replace(_GQA, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=64)


@dataclass(frozen=True)
class Member:
    shape: Shape
    references: tuple[str, ...] = ("meta", "hf")
    format: str = "meta"
    lengths: tuple[int, ...] = (7, 13, 137)  # of the seeded prompts; odd, one longer than a block of anything
    query_scale: float = 1.0  # of the first layer's queries: below 1 attention is less peaked
    tokenizer: Callable[[], bytes] | None = None  # with one, only identity is judged
    trained: bool = False  # in fp32 alone


def sentencepiece_model() -> bytes:
    """A Llama 2-like vocabulary, trained on the built-in texts: byte fallback, dummy prefix, text left as it is."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*BUILT_IN, LONG, *(text for text in CORPUS if text.strip())]),
        model_writer=out, vocab_size=480, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, pad_id=-1,
    )  # fmt: skip
    return out.getvalue()


def llama3_model() -> bytes:
    return llama3_tokenizer().read_bytes()


FAMILY: dict[str, Member] = {
    "gqa": Member(_GQA),
    "tied": Member(
        replace(_GQA, dim=64, n_heads=4, hidden_dim=192, rope_factor=32.0, tied=True), ("meta",), lengths=(7, 71)
    ),
    "flat": Member(replace(_GQA, n_layers=1), ("meta",), lengths=(7, 601), query_scale=0.125),
    "hf": Member(replace(_GQA, dim=64, n_heads=4, hidden_dim=192), ("hf",), format="hf", lengths=(7, 71)),
    "train": Member(replace(_GQA, dim=64, n_heads=4, hidden_dim=192), lengths=(7, 71), trained=True),
    "llama3-text": Member(replace(_TOY, vocab_size=128_256), tokenizer=llama3_model),
    "llama2-text": Member(replace(_TOY, rope_factor=None, rope_theta=10_000.0), tokenizer=sentencepiece_model),
}


def build(
    name: str, folder: Path, progress: bool = False, dtypes: Sequence[str] = DTYPES, references: tuple[str, ...] = ()
) -> Evidence:
    """Write one member's checkpoint and run the references and the oracle on it, in their own processes."""
    member = FAMILY[name]
    shape, checkpoint = member.shape, folder / name / "checkpoint"
    checkpoint.mkdir(parents=True)
    if member.tokenizer is not None:
        model = member.tokenizer()
        (checkpoint / "tokenizer.model").write_bytes(model)
        shape = replace(shape, vocab_size=_vocabulary(model, shape))
    if member.format == "hf":
        write_hf(checkpoint, shape, 0, "bf16")
    else:
        write_meta(checkpoint, shape, 0, "bf16", 1)
    if member.query_scale != 1.0:
        scale_queries(checkpoint / "consolidated.00.pth", member.query_scale)
    case = _case(member, checkpoint, shape.vocab_size, dtypes)
    chosen = references or member.references
    made = Plan(case, chosen, chosen[0], ops=member.tokenizer is None)
    return Runner(made, folder / name, progress).run_references()


def of_checkpoint(
    path: Path,
    folder: Path,
    progress: bool = False,
    seeded_prompts: bool = False,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    sequences: int = 1,
) -> Evidence:
    """A checkpoint of yours in a member's place: on text where it has a tokenizer, else on so many seeded sequences."""
    described = describe(str(path), None)
    if seeded_prompts:
        described = replace(described, tokenizer=None)
    tokens = (seeded(described.config["vocab_size"]).tokens or [])[-sequences:]
    prompts = Prompts([LONG], None, []) if described.tokenizer else Prompts(None, tokens, [])
    request = Request(dtypes=dtypes, checks=("ops", "weights"), max_new_tokens=NEW_TOKENS, texts=False)
    made = plan(request, described, folder, prompts=prompts, large=False)
    folder.mkdir(exist_ok=True)
    return Runner(replace(made, first="meta"), folder, progress).run_references()


def scale_queries(path: Path, factor: float) -> None:
    """By a power of two, so that the stored numbers stay as random as they were."""
    weights = torch.load(path, weights_only=True)
    weights["layers.0.attention.wq.weight"] *= factor
    torch.save(weights, path)


def _vocabulary(model: bytes, shape: Shape) -> int:
    if shape.vocab_size == 128_256:
        return shape.vocab_size
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


def _case(member: Member, checkpoint: Path, vocab_size: int, dtypes: Sequence[str]) -> Case:
    case = Case(
        str(checkpoint), list(dtypes), rope_positions=list(ROPE_POSITIONS), weights=True, max_new_tokens=NEW_TOKENS
    )
    case = replace(case, vocab_size=vocab_size)
    if member.tokenizer is not None:
        case = replace(case, dtypes=["fp32"], record="logits", max_new_tokens=0, corpus=list(CORPUS))
        texts, dialogs = list(BUILT_IN[:3]), [list(d) for d in DIALOGS]
        return replace(case, tokenizer=str(checkpoint / "tokenizer.model"), texts=texts, dialogs=dialogs)
    tokens = seeded(vocab_size).tokens
    assert tokens is not None
    if member.trained:
        case = replace(case, dtypes=["fp32"], training=training_case(vocab_size))
    pool = (tokens[-1] + tokens[0]) * 3
    return replace(case, prompts=[pool[i * 3 : i * 3 + n] for i, n in enumerate(member.lengths)])
