"""Tokens that only the files beside a tokenizer add: those are part of the vocabulary, as for transformers.

    tokenizer_config.json    added_tokens_decoder: {"32000": {"content": "<|im_end|>", "special": true}}
    added_tokens.json        {"<|im_end|>": 32000}
    both NAMED files         bos_token, eos_token and lists (LISTED): ordinary tokens that they make special

They are written into the tokenizer's own content, so that encoding and every export know them. What contradicts that
content is left: the tokenizer has the last word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
LISTED = ("additional_special_tokens", "extra_special_tokens")  # of transformers 4 and 5; 5's may have names, too
MARKED = ("bos_token", "eos_token")  # roles whose token is special, whatever it was


@dataclass(frozen=True)
class Declared:
    """by_id: id -> an entry of added_tokens (content, flags, special); special: names of tokens that no text makes."""

    by_id: dict[int, dict[str, Any]] = field(default_factory=dict)
    special: tuple[str, ...] = ()

    def of_vocabulary(self, ids: Mapping[str, int], listed: set[str]) -> list[dict[str, Any]]:
        """The entries that a vocabulary (text -> id) lacks in its list of added tokens, by id.

        New ones follow the last id without a gap.
        """
        found = {ids[name]: {"content": name, **FLAGS, "special": True} for name in self.special if name in ids}
        texts, n = {i: text for text, i in ids.items()}, len(ids)
        for i, entry in sorted(self.by_id.items()):
            if texts.get(i) == entry["content"]:
                found[i] = entry
            elif i == n and entry["content"] not in ids:
                found[i], n = entry, n + 1
        return [{"id": i, **entry} for i, entry in sorted(found.items()) if entry["content"] not in listed]


def declared(named: list[dict[str, Any]], added: dict[str, Any]) -> Declared:
    """Of tokenizer_config.json, special_tokens_map.json and added_tokens.json; entries of other forms are left."""
    by_id: dict[int, dict[str, Any]] = {
        i: {"content": name, **FLAGS, "special": True} for name, i in added.items() if type(i) is int
    }
    names: list[str] = []
    for content in named:
        listed = content.get("added_tokens_decoder")
        for key, entry in listed.items() if isinstance(listed, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("content"), str) and key.isdecimal() and len(key) < 10:
                by_id[int(key)] = {k: bool(entry.get(k)) for k in (*FLAGS, "special")} | {"content": entry["content"]}
        names += [_name(content.get(key)) for key in MARKED]
        for more in (content.get(key) for key in LISTED):
            names += [
                _name(value)
                for value in (more.values() if isinstance(more, dict) else more if isinstance(more, list) else ())
            ]
    return Declared({i: entry for i, entry in by_id.items() if entry["content"]}, tuple(filter(None, names)))


def _name(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""
