"""Six kits by one command: each Llama that a port meets, small, with what sets it apart from the others.

    python -m parity.kit --set kits         # prints a line for each: llama2       8.1 MB, 4 documents, 302 tokens, ...

kits/NAME is a kit as `--out` writes it; kits/manifest.json (schema nanollama.kits/1) says what each is and holds the
sha256 of every file, the versions of the references and the licence; kits/SHA256SUMS is for `sha256sum -c`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parity.kit.gather import CHECKS, DEFAULT_DTYPES, SHAPE, Source, fill, gather
from parity.kit.seeded import seeded_tokens, write_checkpoint
from parity.machine import workspace
from parity.run.request import Request, require_installed, split_dtypes
from parity.synth.checkpoint import sha256
from parity.synth.shapes import Shape, resized

SCHEMA = "nanollama.kits/1"
LICENCE = "MIT"  # of the repository; the weights are numbers of a generator, nobody's model
LENGTHS = (7, 13, 11, 271)  # odd, and one that shows in bf16 what grows with the position


@dataclass(frozen=True)
class Recipe:
    """What one kit of the set is made from."""

    title: str
    shape: Shape
    lengths: tuple[int, ...] = LENGTHS  # tokens of each document
    trained: bool = True  # losses, gradients, AdamW steps: 36 bytes a parameter


# Published eps are 1e-5; 2e-5 is no code's default. Llama 2 has its own, so that code which knows no other can read it.
RECIPES: dict[str, Recipe] = {
    "llama2": Recipe(
        "Llama 2: a kv head for each query head, theta 10,000, eps 1e-5",
        Shape(64, 2, 4, 4, 192, vocab_size=512, rope_theta=10_000.0, multiple_of=32, context=4096),
    ),
    "llama3": Recipe("Llama 3: heads in groups, theta 500,000", replace(SHAPE, rope_factor=None, context=8192)),
    "llama3.1": Recipe("Llama 3.1: RoPE scaled by 8", SHAPE),
    "llama3.2": Recipe("Llama 3.2: RoPE scaled by 32, the head tied", replace(SHAPE, rope_factor=32.0, tied=True)),
    "70b": Recipe(
        "Llama 3 70B: 8 query heads a kv head, a head is dim / 16 wide; no training",
        resized(SHAPE, dim=128, n_heads=16, n_kv_heads=2, hidden_dim=192),
        trained=False,
    ),
    "packed": Recipe(
        "packed documents and training: nine documents, of one token and up, three layers",
        resized(SHAPE, n_layers=3, dim=48, n_heads=6, n_kv_heads=2, hidden_dim=128, vocab_size=384),
        (1, 31, 2, 64, 5, 259, 1, 9, 17),
    ),
}


def write_kits(out: Path) -> Iterator[str]:
    """Write every kit and the manifest into an empty folder; a line for each as it is done."""
    references = Request().references
    require_installed(references)
    kits = dict[str, Any]()
    for name, recipe in RECIPES.items():
        (out / name).mkdir()
        table = write_one(name, recipe, out / name)
        files = {path.name: sha256(path) for path in sorted((out / name).iterdir())}
        size = sum(path.stat().st_size for path in (out / name).iterdir())
        kits[name] = {"title": recipe.title, "bytes": size, "files": files}
        lengths = table["sequences"]
        yield f"{name:<12} {size / 1e6:4.1f} MB, {len(lengths)} documents, {sum(lengths)} tokens: {recipe.title}"
    made = {"references": list(references), "environment": table["environment"]}
    manifest = {"schema": SCHEMA, "licence": LICENCE, **made, "kits": kits}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    listed = [path for path in sorted(out.rglob("*")) if path.is_file()]
    sums = [f"{sha256(path)}  {path.relative_to(out).as_posix()}\n" for path in listed]
    (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def write_one(name: str, recipe: Recipe, out: Path) -> dict[str, Any]:
    """One kit into an empty folder; returns its table. Raises UsageError, and Crash of a reference."""
    with workspace() as folder:
        return fill(source_of(name, recipe, folder), out)


def source_of(name: str, recipe: Recipe, folder: Path) -> Source:
    """What the references and the oracle computed of a recipe; their traces are left in `folder`."""
    write_checkpoint(recipe.shape, folder / name)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f"{ids}\n" for ids in seeded_tokens(recipe.shape, recipe.lengths)))
    request = Request(
        ckpt=str(folder / name),
        dtypes=split_dtypes(DEFAULT_DTYPES),
        checks=tuple(check for check in CHECKS if recipe.trained or check != "training"),
        prompts=prompts,
        max_new_tokens=0,
        texts=False,
    )
    return replace(gather(request, folder), name=f"seeded, {recipe.title}")
