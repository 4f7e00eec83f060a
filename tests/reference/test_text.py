"""Token ids by the references: each opens the user's own files, whatever their tokens are called."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from reference.files import Checkpoint
from reference.files.weights import Unusable, Weights
from reference.hf_text import HfText
from reference.meta_text import open_text

TEXTS = ["the cat sat on the mat", "twice the cat, once the dog; 12345 times"] * 20
NAMES = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained() -> Tokenizer:
    """GPT-2-style BPE with names of its own for its special tokens, begun with the first of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=NAMES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{NAMES[0]} $A", special_tokens=[(NAMES[0], 0)])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": NAMES[0], "eos_token": NAMES[1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    return tmp_path


def opened(folder: Path, tokenizer: Path | None = None) -> HfText:
    checkpoint = Checkpoint(folder, "hf", {}, Weights({}, layout="hf", head_dim=8))
    return HfText(checkpoint, str(tokenizer) if tokenizer else None)


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def test_bos_and_stop_ids_are_what_the_folder_says_whatever_their_names(folder: Path) -> None:
    text = opened(folder)
    plain = trained().encode("the cat", add_special_tokens=False).ids
    assert text.encode("the cat", bos=True) == [0, *plain]
    assert text.encode("the cat", bos=False) == plain
    assert text.stop_ids == {1, 3, 7}
    assert 2 not in text.encode("<|im_start|>", bos=False)


def test_a_tokenizer_that_begins_with_nothing_begins_with_nothing(folder: Path) -> None:
    edit(folder / "tokenizer.json", post_processor=None)
    assert opened(folder).encode("the cat", bos=True) == opened(folder).encode("the cat", bos=False)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
def test_the_folders_chat_template_is_rendered_from_wherever_it_lies(folder: Path, file: str) -> None:
    if file.endswith(".jinja"):
        (folder / file).write_text(CHATML)
    else:
        (folder / file).touch()
        (folder / file).write_text((folder / file).read_text() or "{}")
        edit(folder / file, chat_template=CHATML)
    text = opened(folder)
    ids = text.dialog([{"role": "user", "content": "the dog"}])
    assert ids is not None and ids[0] == 2 and ids.count(3) == 1
    assert text.model.decode(ids) == "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_refuses_a_dialog_is_no_crash(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="{{ raise_exception('no system') }}")
    assert opened(folder).dialog([{"role": "system", "content": "x"}]) is None
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert opened(folder).dialog([{"role": "user", "content": "x"}]) is None


def test_messages_are_also_read_as_text_alone(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=CHATML)
    text = opened(folder)
    plain, spelled = [{"role": "user", "content": "the"}], [{"role": "user", "content": "the <|im_end|>"}]
    own, stored = list(text.readings())
    assert own.dialog(plain) == stored.dialog(plain) == text.dialog(plain)
    assert own.dialog(spelled) == stored.dialog(spelled) != text.dialog(spelled)
    assert text.decode(own.dialog(spelled) or []) == text.decode(text.dialog(spelled) or [])


def test_a_tokenizer_json_that_a_class_of_transformers_does_not_follow_has_a_reading_as_it_stands(
    folder: Path,
) -> None:
    """LlamaTokenizer builds a tokenizer of its own from the vocabulary: no space before a text that begins with one."""
    pieces = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a", "▁▁"])}
    model = models.BPE(vocab=pieces, merges=[("▁", "a"), ("▁", "▁")], unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)

    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    text = opened(folder)
    _, stored = text.readings()
    assert text.encode("a", bos=True) == stored.encode("a", bos=True)
    assert text.encode(" a", bos=False) == [5]
    assert stored.encode(" a", bos=False) == [3, 5] and stored.sources["tokens"] == "tokenizer.json (as it stands)"


def gguf(path: Path, pre: str | None) -> Path:
    tokenizer = trained()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_token_list(names)
    writer.add_token_types([3 if name in NAMES else 1 for name in names])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["smollm", "default", None])
def test_a_gguf_whose_split_transformers_ignores_has_no_reference_of_it(tmp_path: Path, pre: str | None) -> None:
    with pytest.raises(Unusable, match=rf"splits text as GPT-2 does, though .*tokenizer\.ggml\.pre is {pre!r}"):
        opened(tmp_path, gguf(tmp_path / "x.gguf", pre))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_a_gguf_is_opened_by_transformers_itself(tmp_path: Path, pre: str) -> None:
    text = opened(tmp_path, gguf(tmp_path / "x.gguf", pre))
    assert text.stop_ids == {3}
    assert text.sources["tokens"] == "x.gguf (transformers)"
    assert text.encode("the cat", bos=False) == trained().encode("the cat", add_special_tokens=False).ids
    ids = text.dialog([{"role": "user", "content": "the"}])
    assert ids is not None and ids[0] == 2
    with pytest.raises(Unusable, match=r"Meta's code has no tokenizer here: .* not x\.gguf"):
        open_text(None, str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("reader", [opened, lambda folder: open_text(opened(folder).checkpoint, None)])
def test_a_checkpoint_without_a_tokenizer_is_said_to_have_none(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    with pytest.raises(Unusable, match=r"has no tokenizer here: the checkpoint has no tokenizer\."):
        reader(tmp_path)


def test_rows_without_a_token_decode_to_nothing(folder: Path, llama3_tokenizer_path: Path) -> None:
    text = opened(folder)
    assert text.decode([*text.encode("the cat", bos=False), 300, 10**6]) == "the cat"
    metas = open_text(None, str(llama3_tokenizer_path))
    assert metas.decode([9906, 128_256, 10**6]) == "Hello"
