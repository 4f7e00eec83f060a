"""Exports in Hugging Face transformers: folders by AutoModelForCausalLM and AutoTokenizer, and its own GGUF reader.

python -m pytest tests/interop/test_transformers.py
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_cases import FAMILIES, LLAMA31, make_weights
from nanollama.checkpoint import convert, write_gguf, write_hf
from nanollama.model import ModelConfig, Transformer
from nanollama.tokenizer import open_tokenizer

TOKENS = torch.arange(1, 60).unsqueeze(0)
TEXTS = ["Once upon a time", " two  spaces\n", "สวัสดี 😀 café", "it's 3.14, isn't it?"]


def scaled_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Matrices of gain 2, so that attention is peaked and a wrong angle shows."""
    return {n: t.float() / (4 if t.ndim == 2 else 1) for n, t in make_weights(config, torch.float32).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_greedy_continuation_is_ours(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    from nanollama.generation.llama import Llama, Sampling

    config = FAMILIES[family]
    write_hf(tmp_path / "hf", config, scaled_weights(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    prompt = [1, 5, 60, 33]
    theirs = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 4), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    ours = Llama.load(str(tmp_path / "hf")).generate([prompt], Sampling(max_new_tokens=20))
    assert theirs[0].tolist() == prompt + [event.token for event in ours]


@pytest.mark.parametrize("name", ["llama3", "llama2_tokenizer.model", "tok512.bin"])
def test_the_exported_folder_opens_as_one(
    tmp_path: Path, name: str, test_data: Callable[[str], Path], llama3_tokenizer_path: Path
) -> None:
    """Model and tokenizer from one folder, BOS in front, the chat template where there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = llama3_tokenizer_path if name == "llama3" else test_data(name)
    ours = open_tokenizer(source)
    config = ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=ours.vocab_size, hidden_dim=8)
    write_hf(tmp_path / "hf", config, make_weights(config), tokenizer=source)
    model, tokenizer = (auto.from_pretrained(tmp_path / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0].tolist() == ours.encode(text, bos=True)
        assert model(ids).logits.shape == (1, ids.shape[1], config.vocab_size)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)
    if name == "llama3":
        turn = tokenizer.apply_chat_template([{"role": "user", "content": " hi "}], tokenize=False)
        assert turn == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"


@pytest.mark.filterwarnings("ignore")  # of packages that only the GGUF reader brings along
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "q8_0"])
def test_the_gguf_reader_of_transformers_sees_our_weights(
    tmp_path: Path, dtype: str, test_data: Callable[[str], Path]
) -> None:
    """A reader of other hands: every weight bit-equal, ids equal. It drops rope_freqs: no RoPE scaling."""
    pytest.importorskip("accelerate", reason="transformers' GGUF reader needs it: pip install 'llama-parity[interop]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = replace(LLAMA31, vocab_size=512)
    write_gguf(tmp_path / "x.gguf", config, scaled_weights(config), tokenizer=test_data("tok512.bin"), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ours = convert(tmp_path / "x.gguf", tmp_path / "hf", "hf", dtype="fp32").weights
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    assert read.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, read[name]), name
    assert model.config.rope_parameters["rope_type"] == "default"  # docs/formats.md says so: read by llama.cpp alone
    unscaled = Transformer.from_weights(replace(config, rope_scaling=None), dict(ours), dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, unscaled(TOKENS), rtol=1e-3, atol=1e-4)
    tokenizer, own = (
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf"),
        open_tokenizer(test_data("tok512.bin")),
    )
    assert tokenizer.encode("Once upon a time") == own.encode("Once upon a time", bos=True)


def test_llama2c_checkpoints_reach_transformers(tmp_path: Path, test_data: Callable[[str], Path]) -> None:
    """stories260K as a Hugging Face folder tells its story in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(test_data("stories260K.bin"), tmp_path / "hf", "hf", tokenizer=test_data("tok512.bin"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
