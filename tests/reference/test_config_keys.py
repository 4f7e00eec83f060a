"""config.json keys, by both readers: what changes the computation is refused by name, what nothing reads is noted."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from checkpoint_cases import LLAMA31, make_weights, write
from nanollama.checkpoint import CheckpointError, open_checkpoint
from reference.files import open_folder
from reference.files.weights import Unusable

# Of a real release (SmolLM2-135M's config.json), and others that people publish.
PUBLISHED = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "bos_token_id": 1,
    "pad_token_id": None,
    "pretraining_tp": 2,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "_attn_implementation": "flash_attention_2",
    "unk_token_id": 0,
}
VENDORS = {"unsloth_fixed": True, "max_sequence_length": 2048, "trained_by": "somebody", "temperature": 0.7}
OFF = {"sliding_window": None, "use_sliding_window": False, "num_experts": 0, "residual_multiplier": 1.0}
OFF |= {"layer_types": ["full_attention"] * 2, "pruned_heads": {}, "hidden_act": "silu", "partial_rotary_factor": 1.0}

CHANGES: dict[str, Any] = {
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "model_type": "qwen2",
    "architectures": ["LlamaForSequenceClassification"],
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_interleaved": True,
    "original_max_position_embeddings": 4096,
    "sliding_window": 4096,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "per_layer_config": {"0": {"intermediate_size": 8}},
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_multiplier": 0.0078125,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "final_logit_softcapping": 30.0,
    "use_qk_norm": True,
    "clip_qkv": 8.0,
    "no_rope_layers": [1, 0],
    "auto_map": {"AutoModelForCausalLM": "modeling.Other"},
}
ODD = [0, -1, 1e400, True, "x", "", [], [None], {}, {"a": [1]}, 10**30, "a\nb"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("keys"), "hf", LLAMA31, make_weights(LLAMA31))


@pytest.fixture
def opened(folder: Path) -> Any:
    """opened(changes): the config of both readers and their notices, config.json so changed."""
    path = folder / "config.json"
    before = path.read_text()

    def both(**changes: Any) -> tuple[list[Any], list[list[str]]]:
        path.write_text(json.dumps(json.loads(before) | changes))
        ours, theirs = open_checkpoint(folder), open_folder(folder)
        return [ours.config, theirs.config], [list(ours.notices), list(theirs.notices)]

    yield both
    path.write_text(before)


def test_what_every_release_carries_opens_without_a_word(opened: Callable[..., Any]) -> None:
    assert opened() == opened(_name_or_path="somewhere", torch_dtype="bfloat16", tokenizer_class="X", **OFF)
    assert opened()[1] == [[], []]


def test_what_nothing_reads_opens_with_one_notice(opened: Callable[..., Any]) -> None:
    configs, notices = opened(**PUBLISHED, **VENDORS)
    assert configs == opened()[0]
    assert notices[0] == notices[1]  # a report says it once
    for told in notices:
        assert len(told) == 1
        assert all(f"'{key}'" in told[0] for key in (*VENDORS, "is_llama_config", "transformers.js_config"))
        assert "unk_token_id" not in told[0] and "rope_interleaved" not in told[0]


@pytest.mark.parametrize("key", CHANGES)
def test_what_changes_the_computation_is_refused_by_name(opened: Callable[..., Any], folder: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        opened(**{key: CHANGES[key]})
    if key != "rope_scaling":
        with pytest.raises(Unusable, match=key):
            open_folder(folder)  # with the same changes


@pytest.mark.parametrize(
    ("quantized", "said"),
    [
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fbgemm_fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq, 4"),
        ({"bits": 4}, "unnamed"),
        ([1], "unnamed"),
    ],
)
def test_quantised_weights_are_named_and_what_to_get_instead(
    opened: Callable[..., Any], folder: Path, quantized: Any, said: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"quantization_config.*{said}.*bf16 weights"):
        opened(quantization_config=quantized)
    with pytest.raises(Unusable, match=r"quantization_config.*unquantised"):
        open_folder(folder)


@pytest.mark.parametrize("key", [*CHANGES, *PUBLISHED, *VENDORS, "quantization_config", "rope_parameters", "head_dim"])
def test_odd_values_are_refused_in_one_line_or_opened(opened: Callable[..., Any], folder: Path, key: str) -> None:
    for value in ODD:
        for reader in (opened, lambda **_: open_folder(folder)):
            said = ""
            try:
                reader(**{key: value})
            except (CheckpointError, Unusable) as error:
                said = str(error)
            assert "\n" not in said and len(said) <= 700


def test_the_refused_keys_are_those_that_transformers_reads() -> None:
    """A new version of transformers may read a new key: this test then says which."""
    known = {*CHANGES, "rope_parameters", "tie_word_embeddings", "head_dim", "rms_norm_eps", "vocab_size"}
    known |= {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    known |= {"max_position_embeddings", "initializer_range", "use_cache", "pad_token_id", "bos_token_id"}
    known |= {"eos_token_id", "pretraining_tp", "attention_dropout", "transformers_version", "output_hidden_states"}
    known |= {"return_dict", "dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id"}
    known |= {"problem_type", "model_type"}
    assert {field.name for field in fields(transformers.LlamaConfig)} <= known
