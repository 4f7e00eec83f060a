"""What the files beside a tokenizer say of it: which tokens begin and end a text, the chat template.

    tokenizer_config.json, special_tokens_map.json    bos_token, eos_token, pad_token; add_bos_token; chat_template
    tokenizer_config.json, added_tokens.json          tokens that the tokenizer does not list itself (`added`)
    config.json, generation_config.json               bos_token_id, eos_token_id (one or a list), pad_token_id
    chat_template.jinja, chat_template.json           the template
    additional_chat_templates/NAME.jinja              others, such as tool_use

A file that is missing or broken says nothing here: who opens the model says what is wrong with it.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanollama import gate
from nanollama.gate import documents
from nanollama.vocabulary.added import Declared, declared
from nanollama.vocabulary.value import TokenizerError, TokenType, Vocabulary

MAX_FILE_BYTES = 2**22
NAMED = ("tokenizer_config.json", "special_tokens_map.json")
BY_ID = ("generation_config.json", "config.json")
ADDED = "added_tokens.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FOLDER, MOST_TEMPLATES = "additional_chat_templates", 32
ROLES = ("bos", "eos", "pad")
# What Llama's own names are, for files that stand alone; turns end by these whatever else is declared.
USUAL = {
    "bos": ("<|begin_of_text|>", "<s>"),
    "eos": ("<|end_of_text|>", "</s>", "<|endoftext|>"),
    "pad": ("<|finetune_right_pad_id|>", "<pad>"),
    "turn": ("<|eom_id|>", "<|eot_id|>", "<|im_end|>"),
}


def files_beside(folders: list[Path]) -> dict[str, bytes]:
    """Those that say something, by name; of the first folder that has one."""
    names = (*NAMED, *BY_ID, *TEMPLATES, ADDED)
    found = {name: data for folder in reversed(folders) for name in names if (data := _read(folder / name))}
    paths = [path for folder in folders for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    return found | {f"{TEMPLATE_FOLDER}/{path.name}": _read(path) for path in paths[:MOST_TEMPLATES]}


def declared_tokens(files: dict[str, bytes]) -> Declared:
    return declared([json_object(files.get(name)) for name in NAMED], json_object(files.get(ADDED)))


def with_declared(vocabulary: Vocabulary, files: dict[str, bytes]) -> Vocabulary:
    """The vocabulary with what these files declare; without files, its own word and usual names."""
    named, by_id = [json_object(files.get(name)) for name in NAMED], [json_object(files.get(name)) for name in BY_ID]
    added = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED}
    names = {vocabulary.tokens[i]: i for i, kind in enumerate(vocabulary.types) if kind in added}
    found = {role: _ids(role, named, by_id, names, len(vocabulary.tokens)) for role in ROLES}
    own = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    chosen = {role: found[role][0] if found[role] else own[role] for role in ROLES}
    usual = {role: [names[n.encode()] for n in USUAL[role] if n.encode() in names] for role in USUAL}
    chosen = {role: i if i is not None or not usual[role] else usual[role][0] for role, i in chosen.items()}
    ends = tuple(dict.fromkeys([*found["eos"], *vocabulary.stop_ids, *usual["turn"]]))
    declared = [c["add_bos_token"] for c in named if isinstance(c.get("add_bos_token"), bool)]
    # Of a tokenizer.json the post-processor has the last word (transformers 5), unless it stands alone and has none.
    is_json = vocabulary.format == "json"
    says = vocabulary.add_bos if is_json or not declared else declared[0]
    alone = is_json and not any(named) and vocabulary.bos_id is None
    templates = _templates(files)
    return replace(
        vocabulary,
        bos_id=chosen["bos"],
        eos_id=chosen["eos"],
        pad_id=None if chosen["pad"] in (chosen["eos"], *ends) else chosen["pad"],  # a pad must not teach to go on
        ends=ends,
        add_bos=(says or alone) and chosen["bos"] is not None,
        chat_template=vocabulary.chat_template or templates.pop("default", None),
        named_templates=vocabulary.named_templates or templates,
        named_tokens=vocabulary.named_tokens or _named_tokens(named[0]),
        beside={name: data for name, data in files.items() if name != "config.json" and "/" not in name},
    )


def _ids(
    role: str, named: list[dict[str, Any]], by_id: list[dict[str, Any]], names: dict[bytes, int], n: int
) -> list[int]:
    """Every id that is declared for the role, by name first."""
    found = [names[name.encode()] for c in named if (name := _name(c.get(f"{role}_token"))) and name.encode() in names]
    for content in by_id:
        ids = content.get(f"{role}_token_id")
        found += [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and 0 <= i < n]
    return found


def _name(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _templates(files: dict[str, bytes]) -> dict[str, str]:
    """Name -> template; "default" is the one for any chat. Files of their own go before the tokenizer's settings."""
    own = {"default": files.get(TEMPLATES[0], b"")} | {
        name.partition("/")[2].removesuffix(".jinja"): data for name, data in files.items() if "/" in name
    }
    if any(own.values()):
        return {name: data.decode("utf-8", "replace") for name, data in own.items() if data}
    for content in (json_object(files.get(name)) for name in (TEMPLATES[1], NAMED[0])):
        found = content.get("chat_template")
        if isinstance(found, list):
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = found if isinstance(found, dict) else {"default": found}
        if texts := {name: text for name, text in found.items() if name and isinstance(text, str) and text}:
            return texts
    return {}


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """What templates may call tokens besides BOS and the like, as transformers passes it to them."""
    found = {key: settings[key] for key in settings if re.fullmatch(r"(?!bos|eos|pad|unk)\w+_token", key)}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        more = settings.get(key)
        found |= more if isinstance(more, dict) else {}
    return {key: text for key, value in found.items() if (text := _name(value))}


def _read(path: Path) -> bytes:
    """Nothing where there is no file; raises TokenizerError for one that is not to be read."""
    try:
        gate.require_file(path)
        return documents.read_bytes(path, MAX_FILE_BYTES) if path.is_file() else b""
    except OSError:
        return b""
    except gate.CheckpointError as error:
        raise TokenizerError(str(error)) from None


def json_object(data: bytes | None) -> dict[str, Any]:
    try:
        content = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
