"""The registry of mutants and of benign variants: what `python -m parity.mutants` runs, one entry each.

To add one, write the edit (forward.py, decoding.py, text.py, benign.py) and list it here with the check that has to
kill it (the first that fails, in the order of CHECKS), where it has to be found, and the dtypes in which rounding
leaves it visible. A sibling of another mutant takes its number and a letter from a to e.
"""

from collections.abc import Callable
from dataclasses import dataclass

from parity.mutants.edits import benign, decoding, forward, text, training
from parity.mutants.edits.edit import Load, edited, patched, with_attention, with_config, with_table

ALL = ("fp32", "bf16", "fp16")
LOW = ("bf16", "fp16")


@dataclass(frozen=True)
class Mutant:
    """One way of being wrong."""

    number: str  # in docs/kill-matrix.md
    what: str
    member: str  # of the checkpoint family of parity/mutants/evaluate.py
    load: Load
    killed_by: str  # the first check, in the order of diagnosis, that has to fail
    tap: str  # where it has to be found first; layers count from 0
    dtypes: tuple[str, ...] = ALL  # where it is visible


@dataclass(frozen=True)
class Variant:
    """One way of being right."""

    what: str
    load: Load


def _table(number: str, what: str, member: str, table: Callable, dtypes: tuple[str, ...] = ALL) -> Mutant:
    return Mutant(number, what, member, edited(with_table(table)), "rope", "layers.0.q_rope", dtypes)


def _cache(number: str, what: str, edit: Callable, tap: str, dtypes: tuple[str, ...] = ALL) -> Mutant:
    return Mutant(number, what, "gqa", edited(edit), "cache", tap, dtypes)


def _text(number: str, what: str, member: str, encode: Callable, where: str = "token") -> Mutant:
    return Mutant(number, what, member, edited(text.with_tokenizer(encode)), "tokens", where, ("fp32",))


def _chat(number: str, what: str, edit: Callable) -> Mutant:
    return Mutant(number, what, "llama3-text", edited(edit), "chat", "dialog", ("fp32",))


def _trained(number: str, what: str, edit: Callable, metric: str) -> Mutant:
    """Found by one metric of the check `training`."""
    return Mutant(number, what, "train", edited(edit), "training", metric, ("fp32",))


def _trainer(number: str, what: str, name: str, method: Callable, metric: str) -> Mutant:
    return _trained(number, what, training.in_trainer(name, method), metric)


MUTANTS: tuple[Mutant, ...] = (
    _table("1", "theta 10,000 instead of the checkpoint's 500,000", "gqa", forward.table_of(forward.wrong_theta)),
    _table("2", "Llama 3.1 RoPE scaling dropped", "gqa", forward.table_of(forward.no_scaling)),
    _table("3", "scaling factor 8 where the config says 32", "tied", forward.table_of(forward.factor_8)),
    Mutant("4", "rope_type key ignored", "hf", with_config(forward.no_scaling), "config", "layers.0.q_rope"),
    Mutant("5", "HF q/k rows not un-permuted", "hf", edited(forward.permuted_rows), "weights", "layers.0.q"),
    _table("6", "cos/sin table cast to bf16", "gqa", forward.bf16_table, ("fp32", "fp16")),
    _table("6b", "cos/sin table cast to fp16", "gqa", forward.fp16_table, ("fp32",)),
    _table("7", "inverse frequencies in bf16", "gqa", forward.bf16_frequencies),
    _table("7b", "positions in bf16", "flat", forward.bf16_positions),
    _table("7c", "RoPE base off by 1e-4 of itself", "gqa", forward.table_of(forward.theta_off), ("fp32",)),
    _table("7d", "low_freq_factor 2 for 1", "gqa", forward.table_of(forward.low_factor_2)),
    _table("7e", "high_freq_factor 2 for 4", "gqa", forward.table_of(forward.high_factor_2)),
    _cache("8", "decode position stuck at 0", decoding.with_context(decoding.stuck_position), "logits@cached"),
    _cache("9a", "decode position off by one", decoding.with_context(decoding.late_position), "logits@cached"),
    _cache("9b", "cache slot off by one", decoding.previous_slot, "logits@cached"),
    Mutant("10", "eps 1e-6 in the norms, 2e-5 in the checkpoint", "gqa", edited(forward.tiny_eps), "ops",
           "layers.0.attn_norm"),
    Mutant("10b", "eps 1e-6 in the final norm alone", "gqa", edited(forward.tiny_final_eps), "ops", "final_norm",
           ("fp32",)),
    Mutant("11", "eps from a code default (1e-5)", "gqa", with_config(forward.default_eps), "config",
           "layers.0.attn_norm"),
    Mutant("13", "softmax summed in the low-precision dtype", "flat",
           edited(with_attention(forward.low_precision_softmax)), "ops", "layers.0.attn_mix", LOW),
    Mutant("14", "gate and up swapped", "gqa", edited(forward.swapped_gate_and_up), "ops", "layers.0.gate"),
    Mutant("15", "kv heads interleaved instead of blocked", "gqa", edited(with_attention(forward.interleaved_kv)),
           "ops", "layers.0.attn_mix"),
    Mutant("16", "tied head left random", "tied", edited(forward.random_head), "ops", "logits"),
    Mutant("17", "untied head overwritten by the embedding", "gqa", edited(forward.embedding_as_head), "weights",
           "logits"),
    _cache("18", "causal mask aligned top-left with a cache", decoding.with_context(decoding.top_left_mask),
           "logits@chunked"),
    _cache("19", "no mask when query and key lengths differ", decoding.with_context(decoding.no_mask),
           "logits@chunked"),
    _cache("20", "cache bits reinterpreted as another dtype", decoding.through_cache(decoding.reinterpreted),
           "logits@cached"),
    _cache("21", "cache kept below the compute dtype", decoding.through_cache(decoding.narrower), "logits@cached"),
    _cache("22", "live tokens trimmed from the cache", decoding.with_context(decoding.trimmed), "logits@cached"),
    Mutant("23a", "positions reset per document but no document mask", "gqa", edited(decoding.no_document_mask),
           "metamorphic", "logits@packed"),
    _trainer("23b", "no document mask in training", "batch", training.no_mask, "document mask"),
    _trainer("24", "the last token predicts the next BOS", "labels", training.across_boundary, "target mask"),
    _trainer("25", "mean of means over unequal micro-batches", "accumulated", training.mean_of_means, "accumulation"),
    _trainer("26", "partial window divided by the full count", "accumulated", training.full_window, "accumulation"),
    _trained("27", "labels shifted twice", training.in_loss_and_grads(training.shifted_twice), "loss"),
    _trainer("28", "pad id = eos id masks real EOS targets", "labels", training.eos_is_padding, "target mask"),
    _trained("29", "norm gradients reduced in bf16", training.in_loss_and_grads(training.norms_in_bf16), "gradient"),
    _text("30", "double BOS", "llama3-text", text.double_bos),
    _text("31", "missing BOS", "llama3-text", text.no_bos),
    _text("32", "GPT-2 pre-tokenizer regex", "llama3-text", text.gpt2_pattern),
    _text("33a", "Llama 2 dummy-prefix space doubled", "llama2-text", text.doubled_prefix),
    _text("33b", "Llama 2 dummy-prefix space lost", "llama2-text", text.lost_prefix),
    _text("34a", "plain text encoded as special tokens", "llama3-text", text.special_from_text, "corpus"),
    _chat("34b", "special tokens of a chat encoded as plain text", text.chat_as_plain_text),
    _chat("36a", "a date line that nobody asked for", text.date_line),
    _chat("36b", "one line end after the chat header", text.single_newline),
    Mutant("37", "output depends on the batch", "gqa", edited(decoding.norm_over_batch), "metamorphic",
           "logits@batch"),
    Mutant("38", "causal mask off by one", "gqa", edited(with_attention(forward.sees_next_token)), "ops",
           "layers.0.attn_mix"),
    Mutant("39", "scores not divided by sqrt(head_dim)", "gqa", edited(with_attention(forward.unscaled)), "ops",
           "layers.0.attn_mix"),
    Mutant("40", "residual added after the norm", "gqa", edited(forward.residual_after_norm), "ops", "layers.0.out"),
    Mutant("41", "final norm skipped", "gqa", edited(forward.no_final_norm), "ops", "final_norm"),
    Mutant("42", "last layer skipped", "gqa", edited(forward.no_last_layer), "taps", "final_norm"),
    _trainer("43a", "weight decay applied to norms", "optimizer", training.decayed_norms, "optimizer step"),
    _trainer("43b", "weight decay dropped", "optimizer", training.no_decay, "optimizer step"),
    _trainer("44a", "LoRA merged in bf16", "merge", training.merged_in_bf16, "adapter merge"),
    _trainer("44b", "LoRA merged without alpha / rank", "merge", training.merged_unscaled, "adapter merge"),
    _trainer("45", "prompt tokens in the loss of a pair", "pairs", training.with_prompts, "preferences"),
    _trainer("46", "the rejected answer preferred", "pairs", training.other_way_round, "preferences"),
    _trainer("47", "a mean of log-probabilities for their sum", "pair_loss_model", training.mean_for_sum,
             "preferences"),
    _trainer("48a", "the reference left in training mode", "log_probs", training.training_reference, "preferences"),
    _trainer("48b", "no reference", "reference", training.no_reference, "preferences"),
    _trainer("49", "beta twice", "pair_loss_model", training.beta_twice, "preferences"),
    _trainer("50", "chosen and rejected padded into each other", "pair_batch", training.into_each_other,
             "preferences"),
    _trainer("51", "KL to the teacher the other way round", "distill_model", training.other_direction, "distillation"),
    _trainer("52a", "KL without the temperature's square", "distill_model", training.no_temperature_squared,
             "distillation"),
    _trainer("52b", "the student's distribution at temperature 1", "distill_model", training.cool_student,
             "distillation"),
    _trainer("53", "the teacher reads across documents", "distill_model", training.teacher_without_mask,
             "distillation"),
    _trainer("54", "the teacher followed in prompts, too", "taught_batch", training.followed_at_prompts,
             "distillation"),
    _trainer("55", "a teacher followed everywhere, counted by labels", "taught_count", training.over_labels_alone,
             "distillation"),
    _trainer("56", "the teacher's share given to the labels", "distill_model", training.mixed_the_other_way,
             "distillation"),
    _trainer("57a", "DoRA's lengths of rows not trained", "worn", training.lengths_frozen, "adapters"),
    _trainer("57b", "DoRA's norm not detached", "worn", training.norm_not_detached, "adapters"),
    _trainer("57c", "an adapter trained without alpha / rank", "worn", training.trained_unscaled, "adapters"),
    _trainer("58a", "DoRA merged without its lengths", "merge", training.merged_without_lengths, "adapter merge"),
    _trainer("58b", "DoRA merged by the base's norm", "merge", training.merged_by_the_bases_norm, "adapter merge"),
)  # fmt: skip

VARIANTS: tuple[Variant, ...] = (
    Variant("Meta's operations in Meta's order", edited(forward.NOTHING)),
    Variant("fused attention (SDPA)", edited(forward.NOTHING, "fast")),
    Variant("SDPA, its plain math kernel", edited(with_attention(benign.sdpa_math))),
    Variant("attention in query chunks", edited(with_attention(benign.query_chunks))),
    Variant("attention with a running softmax over key blocks", edited(with_attention(benign.online_softmax))),
    Variant("attention wholly in fp32", edited(with_attention(benign.fp32_attention))),
    Variant("scale in q, additive mask", edited(with_attention(benign.scaled_queries))),
    Variant("grouped heads, nothing repeated", edited(with_attention(benign.grouped))),
    Variant("split-k sums, 2 parts", edited(benign.with_linear(benign.split_k(2)))),
    Variant("split-k sums, 8 parts", edited(benign.with_linear(benign.split_k(8)))),
    Variant("sums from the other end", edited(benign.with_linear(benign.backwards))),
    Variant("transposed weights", edited(benign.with_linear(benign.transposed))),
    Variant("addmm", edited(benign.with_linear(benign.addmm))),
    Variant("einsum", edited(benign.with_linear(benign.einsum))),
    Variant("products in fp32", edited(benign.with_linear(benign.upcast))),
    Variant("one position at a time", edited(benign.with_linear(benign.by_rows))),
    Variant("norm weight multiplied in fp32", edited(benign.with_norm(benign.norm_in_fp32))),
    Variant("torch's rms_norm", edited(benign.with_norm(benign.torch_norm))),
    Variant("norm by vector length and division", edited(benign.with_norm(benign.norm_by_length))),
    Variant("RoPE table by cos() and sin()", edited(with_table(benign.cos_sin_table))),
    Variant(
        "RoPE frequencies in float64, rounded once", edited(with_table(benign.table_from(benign.float64_frequencies)))
    ),
    Variant("RoPE frequencies as repeated products", edited(with_table(benign.table_from(benign.repeated_products)))),
    Variant("RoPE frequencies by a pow 2 ulp off", edited(with_table(benign.table_from(benign.coarse_pow(2))))),
    Variant("RoPE frequencies by a pow 4 ulp off", edited(with_table(benign.table_from(benign.coarse_pow(4))))),
    Variant("RoPE by real products", patched({"apply_rope": benign.real_rope})),
    Variant("half-split RoPE", patched({"apply_rope": benign.half_split_rope})),
    Variant("fused SwiGLU, rounded once", edited(benign.with_ffn(benign.fused_swiglu))),
    Variant("silu as x sigmoid(x)", edited(benign.with_ffn(benign.sigmoid_swiglu))),
    Variant("residual added in fp32", edited(benign.fp32_residual)),
    Variant("head in fp32", edited(benign.fp32_head)),
    Variant("batch of 3 copies", edited(benign.repeated_rows(3))),
    Variant("batch of 16 copies", edited(benign.repeated_rows(16), "fast")),
    Variant("forward as a chunked prefill", edited(benign.in_two_chunks)),
    Variant("two threads", edited(benign.threads(2), "fast")),
    Variant("compiled norms and feed-forward", edited(benign.compiled_blocks, "fast")),
)
