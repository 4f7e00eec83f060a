"""Texts that tokenizers get wrong: the hypothesis strategies of the tokenizer and chat tests."""

from hypothesis import strategies as st

FRAGMENTS = [
    *[" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00", "\x1c"],
    *["I'm", "WE'LL", "don't", "it's", "'S", "’s", "O'Brien", "Hello", " world", "hello", "Straße", "naïve"],
    *["0", "12", "1234567", "3.14", "٣٤", "½", "²", "१२३"],
    *["def f(x):\n    return x  # ok\n", "if (a&&b) {}", "==", "!!!", "...", "—", "</div>", "<0x41>", "a_b", "\\n"],
    *["สวัสดีครับ", "ภาษาไทย", "你好，世界", "こんにちは", "한국어", "مرحبا", "שלום", "Ελληνικά", "Привет", "हिन्दी"],
    *["😀", "👩‍👩‍👧‍👦", "🇹🇭", "e\u0301", "\u0e33", "\U0001f9ff", "\U000e0041", "\uffff"],
]
LOOKALIKES = [
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|reserved_special_token_7|>",
    "<|eot",
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
]


def texts(*, lookalikes: bool = True, exclude: str = "", max_parts: int = 12) -> st.SearchStrategy[str]:
    """Any Unicode text (no lone surrogates), mixed with fragments that cut differently, and special-token text."""
    characters = st.characters(exclude_categories=["Cs"], exclude_characters=exclude)
    fragments = [text for text in FRAGMENTS + LOOKALIKES * lookalikes if not set(text) & set(exclude)]
    runs = st.builds(
        lambda text, n: text * n, st.sampled_from(["a", " ", "\n", "é", "7", "-", "ก"]), st.integers(1, 40)
    )
    part = st.one_of(st.sampled_from(fragments), st.text(characters, max_size=8), runs)
    return st.lists(part, max_size=max_parts).map("".join)
