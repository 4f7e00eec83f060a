"""Runs that are set up and have not begun, for the doctor: six healthy ones, and ills that are planted in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import chat, text
from finetune.config import TrainConfig
from finetune.data.packing import Packer
from finetune.doctor.patient import Patient
from finetune.prepare.stories import stories
from finetune.prepare.tokenizer import train_tokenizer
from finetune.run import only_set_up, run
from nanollama.checkpoint import open_checkpoint, write_hf

DOCS = [story[:90] for story in stories(200, seed=3)]
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "own": INST,
    "chatml": CHATML,
    "no-bos": INST.removeprefix("{{ bos_token }}"),
    "two-bos": "{{ bos_token }}" + INST,
}
SMALL: dict[str, Any] = {"seq_len": 112, "batch_size": 4, "max_steps": 80, "threads": 1, "doctor": "off"}


def home(folder: Path) -> Path:
    """Stories, dialogues, a tokenizer, and a model that was trained on the stories, once for each chat template."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 512}
    (folder / "shape.json").write_text(json.dumps(shape))
    (folder / "stories.txt").write_text("<|endoftext|>".join(DOCS))
    (folder / "book.txt").write_text(" ".join(DOCS))
    (folder / "copies.txt").write_text("<|endoftext|>".join(DOCS[i - i % 20] for i in range(200)))
    (folder / "dialogs.jsonl").write_text("".join(json.dumps(dialog(i)) + "\n" for i in range(60)))
    train_tokenizer(DOCS, 300, folder / "own.model")
    train_tokenizer(
        ["".join(chr(97 + (i * j) % 26) for j in range(60)) for i in range(900)], 300, folder / "other.model"
    )
    files = {
        "data": str(folder / "stories.txt"),
        "cache": str(folder / "cache"),
        "tokenizer": str(folder / "own.model"),
    }
    init = {"init": str(folder / "shape.json"), "lr": 1e-2, "out": str(folder / "run"), "max_steps": 50}
    assert run(text.ENTRY, TrainConfig(**{**SMALL, **files, **init})) == 0
    trained = open_checkpoint(folder / "run" / "final")
    weights = {name: trained.weights[name] for name in trained.weights}
    for name, template in TEMPLATES.items():
        write_hf(folder / name, trained.config, weights, tokenizer=folder / "own.model")
        path = folder / name / "tokenizer_config.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, "chat_template": template}))
    return folder


def dialog(i: int, prompt_chars: int = 20) -> dict[str, list[dict[str, str]]]:
    ask, answer = DOCS[i][:prompt_chars].strip(), DOCS[i][prompt_chars : prompt_chars + 50].strip()
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}


def patient(home: Path, out: Path, entry: str = "text", *, thorough: bool = True, **flags: Any) -> Patient:
    """A run of this entry that is set up; `own` is the trained checkpoint unless `--ckpt` or `--init` is given."""
    found = {"text": text.ENTRY, "chat": chat.ENTRY}[entry]
    data = home / {"text": "stories.txt", "chat": "dialogs.jsonl"}[entry]
    start = {} if "init" in flags else {"ckpt": str(home / "own")}
    usual = {"data": str(data), "cache": str(home / "cache"), "lr": 1e-3, "out": str(out / "run"), **start}
    setup = only_set_up(found, TrainConfig(**{**found.defaults, **SMALL, **usual, **flags}))
    return Patient.of(setup, talks=found.talks, thorough=thorough)


def written(home: Path, name: str, text: str) -> str:
    (home / name).write_text(text, encoding="utf-8")
    return str(home / name)


def documents(home: Path, name: str, change: Callable[[str], str]) -> str:
    return written(home, name, "<|endoftext|>".join(map(change, DOCS)))


def answers(home: Path, name: str, change: Callable[[str], str]) -> str:
    """Dialogues whose prompts are long enough to be no copies of each other."""
    rows = [dialog(i, prompt_chars=60) for i in range(60)]
    for row in rows:
        row["messages"][1]["content"] = change(row["messages"][1]["content"])
    return written(home, name, "".join(json.dumps(row) + "\n" for row in rows))


HEALTHY: dict[str, Callable[[Path, Path], Patient]] = {
    "from scratch": lambda home, out: patient(home, out, init=str(home / "shape.json"), lr=1e-2, vocab_size=300),
    "all parameters": lambda home, out: patient(home, out),
    "an adapter": lambda home, out: patient(home, out, method="lora", lr=2e-3),
    "one book": lambda home, out: patient(home, out, data=str(home / "book.txt"), separator="<|endoftext|>"),
    "dialogues": lambda home, out: patient(home, out, "chat"),
    "dialogues with an adapter": lambda home, out: patient(home, out, "chat", method="lora", lr=2e-3),
}


def with_preface(text: str) -> str:
    return f"Once more. {text[:35]}{chr(0xFFFD) * (sum(map(ord, text)) % 5 == 0)}{text[35:70]}"


# Odd, and right all the same; the quick look is enough for them.
ODD: dict[str, Callable[[Path, Path], Patient]] = {
    "answers of one word": lambda home, out: patient(
        home, out, "chat", thorough=False, data=answers(home, "short.jsonl", lambda text: text.split()[0])
    ),
    "code that is full of braces": lambda home, out: patient(
        home, out, thorough=False, data=documents(home, "code.txt", lambda text: '{"a": [' + text[:70] + "\n}")
    ),
    "a mark of its own from scratch": lambda home, out: patient(
        home, out, thorough=False, init=str(home / "shape.json"), lr=1e-2, vocab_size=300,
        data=documents(home, "marks.txt", lambda text: f"<|tale|>{text[:70]}"),
    ),
    "a preface that all share, and a lost character here and there": lambda home, out: patient(
        home, out, thorough=False,
        data=documents(home, "preface.txt", with_preface),
    ),
}  # fmt: skip


# --- Ills ------------------------------------------------------------------------------------------------------------


def shift_labels(home: Path, out: Path) -> Patient:
    """Each label is the token after the next."""
    ill = patient(home, out)

    class Shifted(Packer):
        def batch(self, rows: Any) -> Any:
            made = super().batch(rows)
            made.labels[:, :-1] = made.labels[:, 1:].clone()
            made.labels[:, -1] = -100
            return made

    ill.packer.__class__ = Shifted
    return ill


def mask_all(home: Path, out: Path) -> Patient:
    ill = patient(home, out, "chat")
    ill.packer.documents.said[:] = False  # type: ignore[attr-defined]
    return ill


def freeze_head(home: Path, out: Path) -> Patient:
    """The embedding is trained as the embedding alone."""
    ill = patient(home, out)
    head = ill.model.head
    ill.model.head = lambda: head().detach().view_as(head())  # type: ignore[method-assign]
    return ill


def untie_head(home: Path, out: Path) -> Patient:
    ill = patient(home, out)
    copy = torch.nn.Parameter(ill.model.head().detach().clone())
    ill.model.head = lambda: copy  # type: ignore[method-assign]
    return ill


def overflow_in_fp16(home: Path, out: Path) -> Patient:
    """Numbers within a layer that fp32 holds and fp16 does not."""
    ill = patient(home, out)
    with torch.no_grad():
        ill.model.layers[1].feed_forward.w1.weight *= 3e3
        ill.model.layers[1].feed_forward.w3.weight *= 3e3
        ill.model.layers[1].feed_forward.w2.weight *= 1e-8
    ill.autocast = torch.autocast("cpu", dtype=torch.float16)
    return ill


ILLS: dict[str, Callable[[Path, Path], Patient]] = {
    "wrong template": lambda home, out: patient(home, out, "chat", ckpt=str(home / "chatml")),
    "no BOS": lambda home, out: patient(home, out, "chat", ckpt=str(home / "no-bos")),
    "doubled BOS": lambda home, out: patient(home, out, "chat", ckpt=str(home / "two-bos")),
    "labels shifted": shift_labels,
    "frozen head": freeze_head,
    "rate too high": lambda home, out: patient(home, out, lr=1e-1),
    "duplicated validation": lambda home, out: patient(home, out, data=str(home / "copies.txt")),
    "all masked": mask_all,
    "overflow": overflow_in_fp16,
    "truncated documents": lambda home, out: patient(home, out, seq_len=48),
    "wrong tokenizer": lambda home, out: patient(home, out, tokenizer=str(home / "other.model")),
    "tied head broken": untie_head,
}


def with_unknown(home: Path, out: Path) -> Patient:
    """Every third token is <unk>, as of a vocabulary without bytes in another script."""
    ill = patient(home, out, thorough=False)
    seen = [(ids.copy(), mask) for ids, mask in ill.documents]
    for ids, _ in seen:
        ids[1::3] = ill.tokenizer.vocabulary.unknown_id
    ill.__dict__["documents"] = seen
    return ill


def copies_of_few(home: Path, out: Path) -> Patient:
    few = written(home, "repeated.txt", "<|endoftext|>".join(DOCS[:10] * 8))
    other = written(home, "unseen.txt", "<|endoftext|>".join(DOCS[100:130]))
    return patient(home, out, thorough=False, data=few, val_data=other)


def marked(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>"


QUICK_ILLS: dict[str, Callable[[Path, Path], Patient]] = {
    "damaged text": lambda home, out: patient(
        home, out, thorough=False, data=documents(home, "lost.txt", lambda text: text[:70].replace("a", "\ufffd", 3))
    ),
    "unknown tokens": with_unknown,
    "rows as text": lambda home, out: patient(
        home,
        out,
        thorough=False,
        seq_len=256,
        data=documents(home, "rows.txt", lambda text: json.dumps({"text": text})),
    ),
    "marks as text": lambda home, out: patient(
        home, out, thorough=False, seq_len=256, data=documents(home, "spelled.txt", marked)
    ),
    "repeated documents": copies_of_few,
    "warmup": lambda home, out: patient(home, out, thorough=False, warmup_steps=100),
}
