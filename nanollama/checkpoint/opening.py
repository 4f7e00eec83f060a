"""From a path to an opened checkpoint: which format it is, which reader reads it, which tokenizer lies beside it.

python -c "from nanollama.checkpoint.opening import sniff; from pathlib import Path; print(sniff(Path('x.gguf')))"
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanollama import gate
from nanollama.checkpoint import hub
from nanollama.checkpoint.fields import read_json
from nanollama.checkpoint.gguf import open_gguf
from nanollama.checkpoint.hf import open_hf
from nanollama.checkpoint.llama2c import open_bin, open_pt
from nanollama.checkpoint.meta import open_meta
from nanollama.checkpoint.weights import Checkpoint, CheckpointError
from nanollama.gguf_header import PART
from nanollama.vocabulary import TokenizerError, read

READERS: dict[str, Callable[[Path], Checkpoint]] = {
    "meta": open_meta,
    "hf": open_hf,
    "llama2c": open_bin,
    "pt": open_pt,
    "gguf": open_gguf,
}
# In order; a tokenizer.json with more tokens than the .model beside it goes before it.
TOKENIZERS = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json", "tokenizer.bin")
ADAPTER = "adapter_config.json"
# What a folder holds where another program wrote it -> whose it is, and what to do.
WRITTEN_BY = {
    "zero_to_fp32.py": "is DeepSpeed's: run `python zero_to_fp32.py . OUT --safe_serialization` there, and give OUT "
    "with config.json and the tokenizer beside it",
    "*_model_states.pt": "is part of a DeepSpeed checkpoint: run zero_to_fp32.py in the folder above",
    "*.distcp": "is a distributed checkpoint of torch (FSDP): write it whole with `accelerate merge-weights DIR OUT`, "
    "and give OUT with config.json and the tokenizer beside it",
    "lit_model.pth": "is LitGPT's: run `litgpt convert_from_litgpt`, and save the result as safetensors",
    "meta_model_*.pt": "is torchtune's: save with its FullModelHFCheckpointer, and give that folder",
    "hf_model_*.pt": "is torchtune's, as pickles: save with safe_serialization=True, and give that folder",
    "*.nemo": "is NeMo's: export it to Hugging Face's format",
    "weights*.npz": "is mlx's: get the model in Hugging Face's format, or as .gguf",
    "flax_model*.msgpack": "is Flax's: load it in transformers 4 with from_flax=True, and save it",
    "tf_model*.h5": "is TensorFlow's: load it in transformers 4 with from_tf=True, and save it",
    "*.onnx": "is for ONNX: get the model in Hugging Face's format, or as .gguf",
    "ggml-model-*.bin": "is of GGML's time, before GGUF (August 2023): get a GGUF of this model",
}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any known format; the path may be a hub id ("org/name") when no such path exists.

    Raises CheckpointError (one line) when it is none, is damaged, or is a model that this project does not compute.
    """
    local = Path(path).expanduser()
    try:
        kind, found = locate(local if local.exists() else hub.fetch(str(path)))
        opened = READERS[kind](found)
        opened = _tokenizer_above(replace(opened, tokenizer=opened.tokenizer or find_tokenizer(found, kind)))
        return opened if opened.tokenizer else replace(opened, notices=[*opened.notices, *_not_a_tokenizer(found)])
    except OSError as error:
        raise CheckpointError(local, f"cannot be read ({error.strerror or error}): check permissions") from None


def sniff(path: Path) -> str:
    """The format of a local path: "meta", "hf", "gguf", "llama2c" (.bin) or "pt" (llama2.c's training checkpoint)."""
    return locate(path)[0]


def locate(path: Path) -> tuple[str, Path]:
    """The format, and the folder or file that holds the model: a folder may hold it as a .gguf, or as a snapshot.

    Raises CheckpointError with what to give instead.
    """
    if path.is_dir():
        return _locate_inside(path)
    kind = gate.kind_of(path) or {".gguf": "gguf", ".bin": "llama2c", ".pt": "pt"}.get(path.suffix)
    if kind in READERS:
        return str(kind), path
    if any((path.parent / name).exists() for name in ("config.json", "params.json", ADAPTER)):
        raise CheckpointError(path, f"is one file of several: give its folder, {path.parent}")
    if kind == "safetensors":
        raise CheckpointError(path, "is weights alone: download config.json beside it, and give the folder")
    begins = f"is a file of no known format, it begins with {gate.first_bytes(path)[:12]!r}"
    raise CheckpointError(path, f"{begins}: give a folder, a .gguf, a .bin or a .pt file")


def _locate_inside(folder: Path) -> tuple[str, Path]:
    """Weights decide: Meta's, else safetensors, else GGUF. A hub copy with Meta's files under original/ is "hf"."""
    is_meta = (folder / "params.json").exists() or bool(_files(folder, "consolidated.*.pth"))
    has_config = (folder / "config.json").exists()
    weights = [path for path in _files(folder, "*.safetensors") if not path.name.startswith("adapter_model")]
    if is_meta and (has_config or weights):
        what = "holds Meta's files (params.json, .pth) and Hugging Face's (config.json, .safetensors): separate them"
        raise CheckpointError(folder, what)
    if not is_meta and not weights:
        return _locate_without_weights(folder, has_config)
    if (folder / "state.json").exists():
        raise CheckpointError(folder, "is the state of a finetuning run, to resume it: give the run's final folder")
    config = folder / ("params.json" if is_meta else "config.json")
    if not config.exists():
        raise gate.missing(config, "is missing beside the weights: download it again")
    return "meta" if is_meta else "hf", folder


def _locate_without_weights(folder: Path, has_config: bool) -> tuple[str, Path]:
    """The folders that are in place of a model's, and hold it or name it."""
    # Beside a model's .gguf lie its eyes, in one of their own.
    ggufs = [path for path in _files(folder, "*.gguf") if not path.name.lower().startswith("mmproj")]
    models = {(match[1], match[3]) if (match := PART.fullmatch(path.name)) else path for path in ggufs}
    if len(models) == 1:
        return "gguf", ggufs[0]
    if ggufs:
        listed = ", ".join(path.name for path in ggufs[:9])
        raise CheckpointError(folder, f"holds {len(models)} models, of which you give one: {listed}")
    if (folder / ADAPTER).exists():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "BASE"
        raise CheckpointError(folder, f"is a LoRA adapter, not a model: give --ckpt {base} --adapter {folder}")
    if _files(folder, "pytorch_model*.bin"):
        raise CheckpointError(folder, gate.to_safetensors(folder))
    if (folder / "snapshots").is_dir():
        return _locate_snapshot(folder)
    if (folder / "final").is_dir():
        raise CheckpointError(folder, f"is the folder of a finetuning run: give its model, {folder / 'final'}")
    if has_config and (folder / "checkpoints").is_dir():
        raise CheckpointError(folder, "is a finetuning run that has not ended: continue it with --resume")
    for pattern, what in WRITTEN_BY.items():
        if found := _files(folder, pattern):
            raise CheckpointError(found[0], what)
    if (folder / "blobs").is_dir() and (folder / "manifests").is_dir():
        what = "is Ollama's store: give the model's own file, which `ollama show --modelfile NAME` names behind FROM"
        raise CheckpointError(folder, what)
    if has_config:
        return "hf", folder  # its reader says which file is missing
    raise CheckpointError(folder, _nothing(folder))


def _locate_snapshot(folder: Path) -> tuple[str, Path]:
    """The folder of one repository in the hub's cache: the snapshot that refs/main names, or the only one."""
    whole = {path.name: path for path in sorted((folder / "snapshots").iterdir()) if _holds_weights(path)}
    main = folder / "refs" / "main"
    revision = gate.first_bytes(main).decode("utf-8", "replace").strip() if main.is_file() else ""
    if revision not in whole and len(whole) == 1:
        (revision,) = whole
    if revision not in whole:
        hub_id = folder.name.removeprefix("models--").replace("--", "/")
        what = f"give one of its snapshots, {', '.join(whole)}" if whole else f"run `hf download {hub_id}` again"
        raise CheckpointError(folder, f"is of the hub's cache and holds {len(whole)} snapshots with weights: {what}")
    return _locate_inside(whole[revision])


def _nothing(folder: Path) -> str:
    """What to say about a folder without any model: the halves of one, or where there is one."""
    halves = [path.name for path in _files(folder, "*") if path.suffix in gate.UNFINISHED]
    if halves:
        return f"holds an unfinished download, {halves[0]}: let it finish, or download it again"
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and _holds_weights(path)]
    files = [path for path in _files(folder, "*.bin") + _files(folder, "*.pt") if path.name != "tokenizer.bin"]
    if inside or files:
        return f"holds no model itself: give {' or '.join(str(path) for path in (inside + files)[:4])}"
    return "holds no checkpoint: expected params.json and consolidated.NN.pth, config.json and .safetensors, or a .gguf"


def _holds_weights(folder: Path) -> bool:
    patterns = ("consolidated.*.pth", "*.safetensors", "*.gguf", "pytorch_model*.bin", "params.json", "snapshots")
    return any(_files(folder, pattern) for pattern in patterns) or (folder / "snapshots").is_dir()


def _files(folder: Path, pattern: str) -> list[Path]:
    """Sorted, without hidden ones (macOS writes a ._x beside each x)."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def find_tokenizer(path: Path, kind: str | None = None) -> Path | None:
    """The tokenizer file that lies in the folder (or beside the file), if any."""
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer.bin", *TOKENIZERS) if kind == "llama2c" or path.suffix == ".bin" else TOKENIZERS
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        return None
    gate.refuse_strangers(found)
    gate.require_inside(found)
    whole = folder / "tokenizer.json"
    if found.suffix == ".model" and whole.is_file() and _count(whole) > (_count(found) or sys.maxsize):
        return whole
    return found


def _not_a_tokenizer(path: Path) -> list[str]:
    """What to say of files that come close to one."""
    folder = path if path.is_dir() else path.parent
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        code = f"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')"
        return [f'vocab.json and merges.txt are half a tokenizer: python -c "{code}" writes tokenizer.json']
    others = [path.name for pattern in ("*.model", "tekken.json", "tok*.bin") for path in _files(folder, pattern)]
    return [f"is {name} its tokenizer? name it with --tokenizer" for name in others[:1]]


def _tokenizer_above(opened: Checkpoint) -> Checkpoint:
    """Llama 2 as Meta ships it: one tokenizer.model for all the folders beside it. It counts if it has the size."""
    above = opened.path.resolve().parent / "tokenizer.model"
    if opened.format != "meta" or opened.tokenizer or not above.is_file():
        return opened
    if _count(above) != opened.config.vocab_size:
        return opened
    return replace(opened, tokenizer=above, notices=[*opened.notices, f"the tokenizer is the one above, {above}"])


def _count(path: Path) -> int:
    """Tokens of a tokenizer file; 0 where it is none, of which its reader knows more to say."""
    try:
        return len(read(path).tokens)
    except TokenizerError:
        return 0
