"""Hugging Face folders as other programs leave them: what a wrapper or a second name hides is read, and what is no
whole model is refused with what to save or get instead.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from checkpoint_cases import LLAMA2, LLAMA31, LLAMA32, assert_same, make_weights, write
from nanollama.checkpoint import CheckpointError, open_checkpoint
from reference.files import open_folder

Q, HEAD, EMBEDDING = "model.layers.0.self_attn.q_proj", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write(tmp_path, "hf", LLAMA31, make_weights(LLAMA31))


def resaved(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def configured(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


WRAPPERS = {
    "torch.compile": "_orig_mod.{}",
    "DDP": "module.{}",
    "DeepSpeed around torch.compile": "module._orig_mod.{}",
    "FSDP": "_fsdp_wrapped_module.{}",
    "peft, without an adapter": "base_model.model.{}",
    "Lightning": "model.{}",
}


@pytest.mark.parametrize("by", WRAPPERS)
def test_weights_that_were_saved_in_a_wrapper_open(hf: Path, by: str) -> None:
    resaved(hf, lambda w: {WRAPPERS[by].format(name): tensor for name, tensor in w.items()})
    opened = open_checkpoint(hf)
    assert_same(opened, LLAMA31, make_weights(LLAMA31), None)
    assert "read as lm_head.weight" in opened.notices[-1]


def test_a_wrapper_within_the_layers_is_taken_off(hf: Path) -> None:
    inner = lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")
    resaved(hf, lambda w: {inner(name): tensor for name, tensor in w.items()})
    assert_same(open_checkpoint(hf), LLAMA31, make_weights(LLAMA31), None)


def test_the_names_of_the_bare_model_open(tmp_path: Path) -> None:
    """As AutoModel saves it, without `model.` (llama.cpp#9211)."""
    weights = make_weights(LLAMA32)
    folder = write(tmp_path, "hf", LLAMA32, weights)
    resaved(folder, lambda w: {name.removeprefix("model."): tensor for name, tensor in w.items()})
    assert_same(open_checkpoint(folder), LLAMA32, weights, None)


def test_the_references_own_reader_takes_wrappers_off_too(hf: Path) -> None:
    resaved(hf, lambda w: {f"module._orig_mod.{name}": tensor for name, tensor in w.items()})
    weights = open_folder(hf).weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in make_weights(LLAMA31).items())


def test_one_weight_under_two_names_is_refused(hf: Path) -> None:
    resaved(hf, lambda w: w | {f"module.{HEAD}": w[HEAD] * 2})
    refused(hf, HEAD, "is there twice", "save the model again")


class Tied(torch.nn.Module):
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in weights.items():
            inner: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in inner._modules:
                    inner.add_module(part, torch.nn.Module())
                inner = inner._modules[part]  # type: ignore[assignment]
            inner.register_parameter(last, torch.nn.Parameter(tensor))
        self.get_submodule("lm_head").weight = self.get_parameter(EMBEDDING)  # type: ignore[assignment]


def test_a_tied_matrix_that_safetensors_kept_under_the_other_name_opens(tmp_path: Path) -> None:
    weights = make_weights(LLAMA32)
    folder = write(tmp_path, "hf", LLAMA32, weights)
    path = folder / "model.safetensors"
    stored = load_file(path)
    save_model(Tied({**stored, HEAD: stored[EMBEDDING]}), str(path))
    if EMBEDDING in load_file(path):  # of the two names safetensors keeps one, by its own rule
        resaved(folder, lambda w: {HEAD if name == EMBEDDING else name: tensor for name, tensor in w.items()})
    assert_same(open_checkpoint(folder), LLAMA32, weights, None)
    assert torch.equal(open_folder(folder).weights["tok_embeddings.weight"], weights["tok_embeddings.weight"])


def test_a_head_that_is_missing_names_the_key_that_ties_it(hf: Path) -> None:
    resaved(hf, lambda w: {name: tensor for name, tensor in w.items() if name != HEAD})
    refused(hf, f"{HEAD} is missing", '"tie_word_embeddings": true', "download")


def test_a_tied_model_with_a_head_of_its_own_names_both_ways_out(tmp_path: Path) -> None:
    folder = write(tmp_path, "hf", LLAMA32, make_weights(LLAMA32))
    resaved(folder, lambda w: w | {HEAD: w[EMBEDDING] + 1})
    refused(folder, "differs from", "set it to false", "remove the head")


STRANGE = {
    "GPTQ": ({f"{Q}.qweight": torch.zeros(4, 8, dtype=torch.int32)}, ("quantised", ".gguf")),
    "AWQ": ({f"{Q}.scales": torch.zeros(4, 8)}, ("quantised", ".gguf")),
    "bitsandbytes": ({f"{Q}.weight.absmax": torch.zeros(4)}, ("quantised", ".gguf")),
    "compressed-tensors": ({f"{Q}.weight_scale": torch.zeros(1)}, ("quantised", ".gguf")),
    "fp8": ({f"{Q}.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)}, ("F8_E4M3", "quantised")),
    "fp64": ({f"{Q}.weight": torch.zeros(64, 64).double()}, ("F64", "model.to(torch.float32)")),
    "a LoRA beside its base": ({f"{Q}.lora_A.default.weight": torch.zeros(4, 64)}, ("LoRA", "merge_and_unload")),
    "biases": ({f"{Q}.bias": torch.zeros(64)}, ("bias", "another model")),
    "fused": ({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(4, 4)}, ("another program",)),
    "Meta's names": ({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, ("Meta's name", "params.json")),
    "ZeRO 3": ({EMBEDDING: torch.zeros(0)}, (EMBEDDING, "zero_to_fp32.py")),
    "FSDP, a flat shard": ({EMBEDDING: torch.zeros(96 * 64)}, (EMBEDDING, "FULL_STATE_DICT")),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_whole_model_says_what_to_get_or_save(hf: Path, what: str) -> None:
    tensors, words = STRANGE[what]
    refused(resaved(hf, lambda w: w | tensors), *words)


def test_a_weight_is_called_by_its_name_in_the_file(hf: Path) -> None:
    refused(configured(hf, vocab_size=95), "model.embed_tokens.weight has shape (96, 64)")


def test_mlx_quantization_is_named(hf: Path) -> None:
    refused(configured(hf, quantization={"group_size": 64, "bits": 4}), "quantization", "quantised", ".gguf")


ROPE = {
    "linear by 1": {"type": "linear", "factor": 1.0},
    "default with what it does not read": {"rope_type": "default", "factor": 8.0, "low_freq_factor": None},
    "of two types the one that transformers takes": {"rope_type": "default", "type": "dynamic"},
}


@pytest.mark.parametrize("what", ROPE)
def test_rope_keys_that_change_nothing_open(tmp_path: Path, what: str) -> None:
    folder = write(tmp_path, "hf", LLAMA2, make_weights(LLAMA2))
    configured(folder, rope_scaling=ROPE[what])
    assert open_checkpoint(folder).config.rope_scaling is None
    assert open_folder(folder).config["rope_scaling"] is None


def test_llama3_scaling_without_its_context_takes_the_models_as_transformers_does(hf: Path) -> None:
    import transformers

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    configured(hf, rope_scaling=scaling, max_position_embeddings=4096)
    theirs = transformers.LlamaConfig.from_pretrained(hf).rope_parameters["original_max_position_embeddings"]
    found = open_checkpoint(hf).config.rope_scaling
    assert found is not None
    assert found.original_context == open_folder(hf).config["rope_scaling"]["original_context"] == theirs == 4096


def test_shards_without_their_index_are_told_from_a_file_of_another_name(hf: Path) -> None:
    only = (hf / "model.safetensors").rename(hf / "model-00001-of-00002.safetensors")
    refused(hf, "model.safetensors.index.json: is missing", "download it, too")
    only.rename(hf / "pytorch_model.safetensors")
    refused(hf, "pytorch_model.safetensors", "name it model.safetensors")


LEFT_BY = {
    "DeepSpeed": ("zero_to_fp32.py", "zero_to_fp32.py . OUT"),
    "FSDP": ("__0_0.distcp", "accelerate merge-weights"),
    "LitGPT": ("lit_model.pth", "litgpt convert_from_litgpt"),
    "torchtune": ("meta_model_0.pt", "FullModelHFCheckpointer"),
    "mlx": ("weights.npz", "Hugging Face's format"),
    "Flax": ("flax_model.msgpack", "from_flax"),
    "GGML": ("ggml-model-q4_0.bin", "get a GGUF"),
}


@pytest.mark.parametrize("program", LEFT_BY)
def test_a_folder_of_another_programs_says_how_it_exports(hf: Path, program: str) -> None:
    name, words = LEFT_BY[program]
    (hf / "model.safetensors").unlink()
    (hf / name).write_bytes(b"something")
    refused(hf, name, words)


def test_ollamas_store_says_which_file_is_the_model(tmp_path: Path) -> None:
    for name in ("blobs", "manifests"):
        (tmp_path / "models" / name).mkdir(parents=True)
    refused(tmp_path / "models", "Ollama", "ollama show --modelfile")


def test_a_folder_that_also_holds_what_the_model_sees_with_opens_the_model(tmp_path: Path) -> None:
    model = write(tmp_path, "gguf", LLAMA31, make_weights(LLAMA31))
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(model.read_bytes())
    assert open_checkpoint(tmp_path).config == LLAMA31


def test_files_that_come_close_to_a_tokenizer_are_named(hf: Path) -> None:
    (hf / "spiece.model").write_bytes(b"something")
    assert "is spiece.model its tokenizer? name it with --tokenizer" in open_checkpoint(hf).notices
    for name in ("vocab.json", "merges.txt"):
        (hf / name).write_bytes(b"something")
    assert "writes tokenizer.json" in open_checkpoint(hf).notices[-1]
