"""Is a kit the same bytes when it is made again? What differs between kits made under other threads and instructions.

    python -m benchmarks.kit_bytes --recipe packed --json benchmarks/results/kit_bytes.json
    again            every byte is the same
    2 threads        every byte is the same
    AVX2             expected.f64 inputs.i32 kit.json kit.txt differ: expected by 1.4e-13 of an array's RMS (...), ...

Vector instructions stand for other machines: `ATEN_CPU_CAPABILITY` bounds those of torch's own code,
`MKL_ENABLE_INSTRUCTIONS` and `DNNL_MAX_CPU_ISA` those of its matrix products.
"""

import json as json_
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanollama.cli import run
from parity.kit.arrays import Kit

WAYS: dict[str, dict[str, str]] = {
    "first": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "again": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"},
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "DNNL_MAX_CPU_ISA": "SSE41"},
}
MAKE = """
import sys
from pathlib import Path
from parity.kit.family import RECIPES, write_one
write_one(sys.argv[1], RECIPES[sys.argv[1]], Path(sys.argv[2]))
"""


def make(recipe: str, out: Path, way: dict[str, str]) -> Kit:
    out.mkdir()
    subprocess.run([sys.executable, "-c", MAKE, recipe, str(out)], env={**os.environ, **way}, check=True)
    return Kit(out)


def compare(one: Kit, other: Kit) -> dict[str, Any]:
    """Files whose bytes differ; how far expected values are off (of their array's RMS), bounds (of themselves)."""
    files = [path.name for path in sorted(one.folder.iterdir())
             if path.name != "SHA256SUMS" and path.read_bytes() != (other.folder / path.name).read_bytes()]  # fmt: skip
    table = [(array.name, array.file, array.offset, array.shape) for array in one.arrays.values()]
    same_table = table == [(array.name, array.file, array.offset, array.shape) for array in other.arrays.values()]
    expected = bounds = 0.0
    worst, decided = "", {}
    for name, array in one.arrays.items():
        mine, theirs = one.get(name).double(), other.get(name).double()
        if array.file == "expected.f64":
            off = float((mine - theirs).abs().max() / mine.square().mean().sqrt())
            expected, worst = max((expected, worst), (off, name))
        elif bool((mine != theirs).any()):
            decided[name] = int((mine != theirs).sum())
    for a, b in zip(one.gates, other.gates, strict=True):
        if a.bound:
            bounds = max(bounds, abs(b.bound / a.bound - 1))
    return {"files": files, "same_table": same_table, "expected": expected, "worst": worst, "bounds": bounds,
            "inputs": decided}  # fmt: skip


def tell(found: dict[str, Any]) -> str:
    if not found["files"]:
        return "every byte is the same"
    inputs = "".join(f", {n} numbers of {name}" for name, n in found["inputs"].items())
    return (
        f"{' '.join(found['files'])} differ: expected by {found['expected']:.1e} of an array's RMS ({found['worst']}), "
        f"bounds by {found['bounds']:.1%}{inputs}"
    )


def main(
    *,
    recipe: str = "packed",  # of the kits of `python -m parity.kit --set`
    json: Path | None = None,  # file for the result
) -> int:
    """Make one kit in several ways and compare the bytes."""
    with tempfile.TemporaryDirectory() as folder:
        first = make(recipe, Path(folder) / "first", WAYS["first"])
        result: dict[str, Any] = {"recipe": recipe, "environment": first.table["environment"], "ways": {}}
        for name, way in list(WAYS.items())[1:]:
            found = compare(first, make(recipe, Path(folder) / name, way))
            result["ways"][name] = {"set": way, **found}
            print(f"{name:<16} {tell(found)}", flush=True)
    if json is not None:
        json.write_text(json_.dumps(result, indent=1) + "\n")
    exact = [result["ways"][name]["files"] == [] for name in ("again", "2 threads")]
    return 0 if all(exact) else 1


if __name__ == "__main__":
    run(main)
