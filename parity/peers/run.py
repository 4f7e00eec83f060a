"""One row: its environment, its checkpoint, a run of parity.check, and what the report says of it."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parity.contract import UsageError
from parity.peers.registry import Peer
from parity.run.prompts import seeded
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES, Shape, resized

ROOT = Path(__file__).resolve().parents[2]
CHECKS = "logits,kl,argmax,greedy,cache,metamorphic"
_TINY = replace(SHAPES["tiny"], n_layers=4)
# Name -> shape, format, dtype of a .gguf.
CHECKPOINTS: dict[str, tuple[Shape, str, str]] = {
    "3.1-meta": (_TINY, "meta", ""),
    "3.1-hf": (_TINY, "hf", ""),
    "3.1-gguf-fp32": (_TINY, "gguf", "fp32"),
    "3.1-gguf-fp16": (_TINY, "gguf", "fp16"),
    "3.1-gguf-q8_0": (replace(_TINY, hidden_dim=384), "gguf", "q8_0"),
    "3-gguf-fp32": (replace(SHAPES["tiny-3"], n_layers=4), "gguf", "fp32"),
    "3.2-meta": (replace(_TINY, rope_factor=32.0), "meta", ""),
    "3-meta": (replace(SHAPES["tiny-3"], n_layers=4), "meta", ""),
    "3.1-eps-meta": (replace(_TINY, norm_eps=1e-5), "meta", ""),
    "2-mha-meta": (replace(SHAPES["tiny-llama2"], n_kv_heads=8, norm_eps=1e-5), "meta", ""),
    "2-lit-meta": (resized(SHAPES["tiny-llama2"], n_kv_heads=8, norm_eps=1e-5, hidden_dim=512), "meta", ""),
    "2-gqa-meta": (SHAPES["tiny-llama2"], "meta", ""),
    "2-mha-hf": (replace(SHAPES["tiny-llama2"], n_kv_heads=8), "hf", ""),
    "2-gqa-hf": (SHAPES["tiny-llama2"], "hf", ""),
}


@dataclass(frozen=True)
class Row:
    """What became of one peer. Where it was not run, `why` says so, and the rest is empty."""

    name: str
    version: str = ""
    verdicts: dict[str, str] | None = None  # by dtype: pass, fail, quantized
    rho: dict[str, float] | None = None  # by dtype: of the logits, the largest of both references
    kl: dict[str, float] | None = None  # by dtype: mean, in nats
    cause: str = ""
    notices: tuple[str, ...] = ()
    why: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(peer: Peer, folder: Path, envs: Path, clones: Path | None) -> Row:
    """Judge one peer. folder: of checkpoints and reports; envs: of environments; clones: of repositories."""
    path = [str(ROOT)]
    if peer.clone:
        clone = (clones or Path()).resolve() / peer.clone.rpartition("/")[2]
        if clones is None or not clone.is_dir():
            return Row(peer.name, why=f"needs a clone: git clone github.com/{peer.clone} into --clones FOLDER")
        path.append(str(clone))
        peer = replace(peer, candidate=peer.candidate.replace("{clone}", str(clone)))
    try:
        python = environment(peer, envs)
        report = check(peer, python, made(peer.checkpoint, folder), folder, os.pathsep.join(path))
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        return Row(peer.name, why=f"could not be run: {said[-1] if said else error}")
    return row(peer, report, version(peer, python, clones))


def environment(peer: Peer, envs: Path) -> Path:
    """The interpreter to run it by: this one, or one of an environment that also sees what this one has."""
    if not peer.packages:
        return Path(sys.executable)
    folder = envs / peer.packages[0]
    python, done = folder / "bin" / "python", folder / ".done"
    if not done.is_file():
        venv.create(folder, with_pip=True)
        ours = sysconfig.get_paths()["purelib"]
        [theirs] = folder.glob("lib/python*/site-packages")
        (theirs / "zz_shared.pth").write_text(ours + "\n")
        _said([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *peer.packages])
        done.write_text("")
    return python


def made(name: str, folder: Path) -> Path:
    """The checkpoint, written once. A .gguf has a vocabulary, since some readers take the number of tokens from it."""
    from parity.mutants.family import sentencepiece_model

    shape, format, dtype = CHECKPOINTS[name]
    out = folder / (f"{name}.gguf" if format == "gguf" else name)
    if out.exists():
        return out
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.is_file():
        tokenizer.write_bytes(sentencepiece_model())
    shape = replace(shape, vocab_size=pieces(tokenizer))
    source = folder / f"{name}-source" if format == "gguf" else out
    synthesise(shape, source, format="hf" if format == "gguf" else format)
    if format == "gguf":
        flags = ["--format", "gguf", "--dtype", dtype, "--tokenizer", str(tokenizer)]
        _said([sys.executable, "-m", "nanollama", "convert", str(source), str(out), *flags])
    return out


def pieces(tokenizer: Path) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()


def check(peer: Peer, python: Path, checkpoint: Path, folder: Path, path: str) -> dict[str, Any]:
    """The report of parity.check, on the same seeded prompts for everybody."""
    prompts, out = folder / "prompts.jsonl", folder / f"{peer.name}.json"
    ids = seeded(pieces(folder / "tokenizer.model")).tokens or []
    prompts.write_text("".join(json.dumps(tokens) + "\n" for tokens in ids))
    flags = ["--ckpt", str(checkpoint), "--candidate", peer.candidate, "--dtype", peer.dtypes, "--checks", CHECKS]
    more = ["--prompts", str(prompts), "--max_new_tokens", "8", "--json", str(out)]
    _said([str(python), "-m", "parity.check", *flags, *more], path, (0, 1, 3))
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _said(line: list[str], path: str = str(ROOT), fine: tuple[int, ...] = (0,)) -> str:
    """stdout of a command. Raises CalledProcessError for an exit code that is not among `fine`."""
    variables = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=variables)
    if done.returncode not in fine:
        raise subprocess.CalledProcessError(done.returncode, line, done.stdout, done.stderr)
    return done.stdout


def version(peer: Peer, python: Path, clones: Path | None) -> str:
    if not peer.clone:
        code = f"from importlib.metadata import version; print(version({peer.versioned_by!r}))"
        return _said([str(python), "-c", code]).strip()
    folder = (clones or Path()) / peer.versioned_by
    done = subprocess.run(["git", "-C", str(folder), "log", "-1", "--format=%h"], capture_output=True, text=True)
    mark = folder / "COMMIT"  # of a copy without its history
    return done.stdout.strip() if (folder / ".git").exists() else mark.read_text().strip() if mark.is_file() else "?"


def row(peer: Peer, report: dict[str, Any], version: str) -> Row:
    """What the table says, from a report; of a peer that could not even be asked, why."""
    if not report["tokens"]["positions"]:
        return Row(peer.name, version, why=f"could not be run: {report['why']}")
    verdicts, rho, kl = dict[str, str](), dict[str, float](), dict[str, float]()
    for dtype in peer.dtypes.split(","):
        results = [r for r in report["results"] if r["dtype"] == dtype]
        bad = any(r["status"] in ("fail", "error") for r in results)
        judged = any(r["status"] == "pass" for r in results)
        good = "quantized" if any("int" in q["scheme"] for q in report["quantized"]) else "pass"
        verdicts[dtype] = "fail" if bad else good if judged else "not covered"
        values = [
            r["value"] for r in results if (r["check"], r["metric"]) == ("logits", "rho") and r["value"] is not None
        ]
        nats = [float(r["where"].split()[0]) for r in results if r["metric"] == "KL mean" and r["where"]]
        rho |= {dtype: max(values)} if values else {}
        kl |= {dtype: max(nats)} if nats else {}
    first = report["first_divergence"] or {}
    notices = tuple(n for n in report["notices"] if n.startswith("RoPE table"))
    why = "" if rho else report["why"]
    cause = first.get("probable_cause", "")
    return Row(peer.name, version, verdicts, rho, kl, cause, notices, why, report["seconds"])


def chosen(only: str | None, peers: tuple[Peer, ...]) -> list[Peer]:
    """The peers of a comma list. Raises UsageError for a name that none has."""
    wanted = [name.strip() for name in (only or "").split(",") if name.strip()]
    known = {peer.name: peer for peer in peers}
    for name in wanted:
        if name not in known:
            raise UsageError(f"--only {name}: no peer has this name; known are {', '.join(known)}")
    return [known[name] for name in wanted] or list(peers)
