"""Broken tokenizer files of every kind: one line that says what is wrong, or a tokenizer that works; never a crash."""

import base64
import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from nanollama.tokenizer import TokenizerError, open_tokenizer

SENTENCE = "Once upon a time, there was 1 little สวัสดี 😀\n"


def rank_file() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"on", b"ce", b"once"]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def bin_file() -> bytes:
    tokens = [
        "<unk>",
        "\n<s>\n",
        "\n</s>\n",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *" abcdeno",
        "on",
        "once",
        " a",
    ]
    entries = [struct.pack("<fi", -float(i), len(token)) + token.encode() for i, token in enumerate(tokens)]
    return struct.pack("<I", 7) + b"".join(entries)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, score: float, kind: int) -> bytes:
    return message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))


def spm_file(
    pieces: list[bytes] | None = None, trainer: bytes = b"\x18\x02\x98\x02\x01", normalizer: bytes = b"\x18\x01\x20\x00"
) -> bytes:
    """A sentencepiece BPE model with byte fallback; normalizer: dummy prefix on, extra spaces kept."""
    if pieces is None:
        pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
        pieces += [piece(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
        pieces += [piece(text, -float(i), 1) for i, text in enumerate(["on", "▁a", *"▁abcdeno"])]
    return b"".join(pieces) + message(2, trainer) + message(3, normalizer)


def rules(unit: int) -> bytes:
    """A normalizer whose trie is one unit again and again."""
    return message(2, struct.pack("<257I", 1024, *[unit] * 256) + b"a\0")


def json_file() -> bytes:
    from nanollama.vocabulary.spoken import LLAMA3
    from nanollama.vocabulary.value import byte_alphabet, llama3_special_tokens

    vocab = {character: i for i, character in enumerate(byte_alphabet())} | {"on": 256}
    added = [
        {
            "id": i,
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, name in enumerate(map(bytes.decode, llama3_special_tokens()), 257)
    ]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["o n"], "ignore_merges": True},
    }
    return json.dumps(content).encode()


KINDS: dict[str, Callable[[], bytes]] = {"llama3": rank_file, "llama2": spm_file, "llama2c": bin_file, "hf": json_file}


def refusal(path: Path, data: bytes) -> str:
    """The message that refuses the file; fails the test where it is accepted or is not one line."""
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        open_tokenizer(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_the_small_files_are_good(kind: str, tmp_path: Path) -> None:
    """And the name does not matter."""
    path = tmp_path / "weights.gguf"
    path.write_bytes(KINDS[kind]())
    tokenizer = open_tokenizer(path)
    assert tokenizer.kind == kind
    assert tokenizer.decode(tokenizer.encode(SENTENCE, bos=False)) == SENTENCE
    assert len(tokenizer.encode("on", bos=False)) < 3


@pytest.mark.parametrize("first", [b"{", b"[", b"\n", b" ", b"A"])
def test_a_bin_may_start_with_any_byte(first: bytes, tmp_path: Path) -> None:
    """The first number is the longest token's length, which no reader needs."""
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(first + bin_file()[1:])
    assert open_tokenizer(path).kind == "llama2c"


def corrupt(data: bytes, draw: random.Random) -> bytes:
    at, other = sorted(draw.choices(range(len(data)), k=2))
    length = draw.choice([1, 2, 4, 8, 100])
    return draw.choice(
        [
            lambda: data[:at],
            lambda: data[at:],
            lambda: data[:at] + data[other:],
            lambda: data[:at] + draw.randbytes(length) + data[at + length :],
            lambda: data[:at] + draw.randbytes(length) + data[at:],
            lambda: data[:at] + bytes(length) + data[at + length :],
            lambda: data[:at] + b"\xff" * length + data[at + length :],
            lambda: data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :],
            lambda: data[:other] + data[at:],
        ]
    )()


@pytest.mark.parametrize("inputs", [40, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.fuzz])])
@pytest.mark.parametrize("kind", KINDS)
def test_corrupted_files_are_refused_in_one_line_or_work(kind: str, inputs: int, tmp_path: Path) -> None:
    data, path = KINDS[kind](), tmp_path / "tokenizer"
    refused = 0
    for seed in range(inputs):
        path.write_bytes(corrupt(data, random.Random(f"{kind} {seed}")))
        message, tokenizer = "", None
        try:
            tokenizer = open_tokenizer(path)
        except TokenizerError as error:
            message = str(error)
        assert "\n" not in message
        refused += tokenizer is None
        if tokenizer is not None:
            ids = tokenizer.encode(SENTENCE, bos=True)
            assert isinstance(tokenizer.decode(ids), str)
            assert max(ids) < tokenizer.vocab_size
    assert refused > inputs / 3


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_are_refused(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind]()
    for size in [0, 1, 2, 3, 5, 9, 100, len(data) // 2, len(data) - 3]:
        refusal(tmp_path / "tokenizer", data[:size])


RANKS = rank_file()
BIN = bin_file()
HEAD = struct.pack("<I", 7)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\n ", "empty"),
        (b"\x00" * 64, "neither"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "neither"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "tokenizer.ggml.model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(64), "neither"),
        (b"A text, and no tokenizer.\n", "neither"),
        (b"{}", "no \"model\""),
        (b"[1, 2]", "no \"model\""),
        (b'{"model": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"dim": 4096, "n_layers": 32}', "no \"model\""),
        (b'{"model": {"type": "WordPiece", "vocab": {}}}', "expected \"BPE\""),
        (b'{"model": {"type": "Unigram", "vocab": []}}', "0 tokens"),
        (b'{"model": {"type": "Unigram", "vocab": [["a"]]}}', "pieces with scores"),
        (b'{"model": {"type": "BPE", "merges": [], "vocab": {"a": "b"}}}', "no map"),
        (b'{"model": {"type": "BPE", "merges": [], "vocab": {"a": 99999999999}}}', "not 0..0"),
        (json_file().replace(b'"o n"', b'"o q!"'), "out of vocabulary"),
        (json_file().replace(b'"normalizer": null', b'"normalizer": {"type": "Precompiled"}'), "Precompiled"),
        (json_file().replace(b'"normalizer": null', b'"normalizer": ' + b'{"a": ' * 40 + b"1" + b"}" * 40), "deep"),
        (json_file().replace(b'"id": 300', b'"id": 299'), "not 0.."),
        (json_file().replace(b'"id": 300', b'"id": -1'), "not 0.."),
        (RANKS + b"!!!! 262\n", "bad base64"),
        (RANKS + b"dGhl\n", "line 263"),
        (RANKS + b"dGhl 262\n", "twice"),
        (RANKS + b"dGhlcmU= 261\n", "each once"),
        (RANKS + b"dGhlcmU= 400000000\n", "each once"),
        (RANKS + b"dGhlcmU= 99999999999999999999\n", "expected a base64"),
        (RANKS + b"dGhlcmU= -1\n", "expected a base64"),
        (b"".join(RANKS.splitlines(keepends=True)[:200]), "single bytes"),
        (HEAD + struct.pack("<fi", 0, 2**31 - 1), "the header allows"),
        (HEAD + struct.pack("<fi", 0, -1), "the header allows"),
        (HEAD + struct.pack("<fi", 0, 7) + b"abc", "3 are left"),
        (BIN + struct.pack("<fi", float("nan"), 1) + b"z", "score nan"),
        (BIN + struct.pack("<fi", 0, 2) + b"\xff\xfe", "utf-8"),
        (struct.pack("<I", 2**31) + BIN[4:], "neither"),
        (BIN[:4] + BIN[17:], "<0x00>"),
        (BIN + BIN[-10:], "twice"),
        (BIN + b"\0" * 5, "cut off"),
        (HEAD + bytes(8) * 2_000_000, "tokens"),
        (b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", "a cut one"),
        (b"\x0a\xff\xff\xff\xff\x0f" + b"abc", "a cut one"),
        (b"\x0a\x05\x0a\x05<unk>", "a cut one"),
        (spm_file([piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]), "byte pieces are missing"),
        (spm_file() + piece("on", 0, 1), "twice"),
        (spm_file() + piece("", 0, 1), "empty"),
        (spm_file() + piece("a\0b", 0, 1), "NUL"),
        (spm_file() + piece("<unk2>", 0, 2), "exactly one unknown"),
        (spm_file() + piece("x", float("inf"), 1), "score inf"),
        (spm_file() + piece("<0xZZ>", 0, 6), "none of"),
        (spm_file() + message(1, b"\x0a\x02\xff\xfe"), "utf-8"),
        (spm_file() + message(1, b"\x0d\x00\x00\x00\x00"), "."),
        (spm_file(trainer=b"\x18\x04"), "model type 4"),
        (spm_file(trainer=b"\x18\x02\xc0\x01\x01"), "treat_whitespace"),
        (spm_file(normalizer=b"\x12\x04abcd"), "rules for rewriting"),
        (spm_file(normalizer=rules(1 << 30)), "outside"),
        (spm_file(normalizer=rules(1 << 31 | 2)), "outside"),
        (spm_file(normalizer=b"\x28\x00"), "escape_whitespaces"),
        (spm_file() + message(5, b"\x12\x01a"), "denormalizer"),
        (message(1, b"") * 2_000_000, "neither"),
        (spm_file() + b"\x0a\x00" * 2_000_000, "more than"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(tmp_path / "tokenizer.model", data)


def test_no_file_is_refused(tmp_path: Path) -> None:
    for path, reason in [(tmp_path, "folder"), (tmp_path / "none", "does not exist"), (Path("/dev/zero"), "regular")]:
        with pytest.raises(TokenizerError, match=reason):
            open_tokenizer(path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: takes no disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TokenizerError, match="no tokenizer is above"):
        open_tokenizer(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB


def own_model(folder: Path, text: Path, **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "own"), vocab_size=100, minloglevel=2, **options
    )
    return folder / "own.model"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_trained_by_sentencepieces_defaults_opens(
    model_type: str, tmp_path: Path, test_data: Callable[[str], Path]
) -> None:
    """Its rules (nmt_nfkc) change the text; the ids are the package's own all the same."""
    path = own_model(tmp_path, test_data("tinystories_valid_excerpt.txt"), model_type=model_type)
    package, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), open_tokenizer(path)
    for text in ["Once upon a time", "  two   spaces ", "ﬁne Ｗide ①", "", "ภาษา"]:
        ids = ours.encode(text, bos=True)
        assert ids == package.encode(text, add_bos=True)
        assert ours.decode(ids) == package.decode(ids)


def test_rules_that_lead_outside_are_refused(tmp_path: Path, test_data: Callable[[str], Path]) -> None:
    data = own_model(tmp_path, test_data("tinystories_valid_excerpt.txt")).read_bytes()
    at = data.index(b"nmt_nfkc") + 40
    for unit in (b"\xff\xff\xff\x7f", b"\x00\x00\x00\xc0"):
        reason = refusal(tmp_path / "x.model", data[:at] + unit * 200 + data[at + 800 :])
        assert "rules for rewriting text" in reason
