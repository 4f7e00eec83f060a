"""The three references on tiny checkpoints: they agree within their rounding, in every format and every way to run.

Meta's code and transformers each run once, over all cases, in a process of their own; the tests read the traces.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reference_checkpoints import Shape, make_weights, write_hf, write_meta

UNIT = {"fp32": 6e-8, "fp16": 4.9e-4, "bf16": 3.9e-3}  # relative rounding
ALL_DTYPES = ("fp32", "bf16", "fp16")
ROPE_POSITIONS = [0, 1, 17, 8191, 8192, 131071]

BASE = Shape()
SHARDED = Shape(n_heads=16, n_kv_heads=8, head_dim=4, vocab_size=320)
SHAPES = {
    "base": BASE,
    "tied": replace(BASE, tied=True),
    "factor32": replace(BASE, factor=32.0),
    "llama2": replace(BASE, n_kv_heads=4, factor=None, rope_theta=10000.0, vocab_size=302),
}


@dataclass
class Bench:
    """A folder of checkpoints and traces."""

    root: Path
    runs: dict[str, list[list[str]]] = field(default_factory=dict)  # module -> command lines

    def case(self, name: str, checkpoint: str, prompts: list[list[int]], **changes: Any) -> Path:
        values = {
            "schema": "nanollama.case/1",
            "checkpoint": str(self.root / checkpoint),
            "tokenizer": None,
            "dtypes": ["fp32", "bf16"],
            "device": "cpu",
            "threads": 1,
            "prompts": prompts,
            "texts": None,
            "corpus": [],
            "dialogs": [],
            "max_new_tokens": 0,
            "record": "taps",
            "positions": None,
            "rope_positions": ROPE_POSITIONS,
            "weights": True,
            "stream": "auto",
            "whole_bytes": None,
        }
        path = self.root / f"{name}.json"
        path.write_text(json.dumps(values | changes))
        return path

    def add(self, module: str, name: str, checkpoint: str, prompts: list[list[int]], **changes: Any) -> None:
        case = self.case(f"{module}.{name}", checkpoint, prompts, **changes)
        line = ["--case", str(case), "--out", str(self.root / "out" / f"{module}.{name}")]
        self.runs.setdefault(module, []).append(line)

    def start(self, module: str) -> subprocess.Popen[str]:
        """All command lines of a module in one process: the packages take seconds to import."""
        where = {"oracle": "oracle.__main__"}.get(module, module)
        program = f"import json, sys; from reference.{where} import main; [main(one) for one in json.load(sys.stdin)]"
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(self.runs[module]))
        process.stdin.close()
        process.stdin = None
        return process

    def trace(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / "out" / name / "trace.json").read_text())

    def taps(self, name: str, dtype: str) -> dict[str, Tensor]:
        """Every recorded tensor of a trace at a run dtype."""
        folder = self.root / "out" / name / self.trace(name)["dtypes"][dtype]
        return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}

    def rope(self, name: str) -> dict[str, Tensor]:
        return load_file(self.root / "out" / name / "rope.safetensors")


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def seeded_prompts(vocab_size: int, lengths: tuple[int, ...] = (1, 17, 61)) -> list[list[int]]:
    rng = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (length,), generator=rng).tolist() for length in lengths]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("reference"))
    write_checkpoints(bench.root)
    prompts = seeded_prompts(300)
    for module in ("meta", "hf"):
        bench.add(module, "base", "base.meta", prompts, dtypes=list(ALL_DTYPES), max_new_tokens=5)
        bench.add(module, "base_hf", "base.hf", prompts, dtypes=list(ALL_DTYPES))
        bench.add(module, "streamed", "base.meta", prompts, dtypes=list(ALL_DTYPES), stream="always")
        bench.add(module, "streamed_hf", "base.hf", prompts, dtypes=list(ALL_DTYPES), stream="always")
        bench.add(module, "positions", "base.hf", prompts, positions=[[0], [], [3, 60]])
        bench.add(module, "auto", "base.hf", prompts, max_new_tokens=3, whole_bytes=500_000, record="logits")
        for name in ("tied", "factor32", "llama2"):
            bench.add(module, name, f"{name}.hf", prompts)
        for name in ("factor32", "llama2"):
            bench.add(module, f"{name}_meta", f"{name}.meta", prompts)
        for shards in (1, 2, 8, 16):
            bench.add(module, f"shards{shards}", f"sharded{shards}", prompts, stream="never")
        bench.add(module, "shards16_streamed", "sharded16", prompts, stream="always")
    for name in SHAPES:
        bench.add("oracle", name, f"{name}.hf", prompts, dtypes=list(ALL_DTYPES))
    bench.add("oracle", "base_meta", "base.meta", prompts)
    bench.add("oracle", "positions", "base.hf", prompts, positions=[[0], [], [3, 60]])
    references = [bench.start("meta"), bench.start("hf")]
    for process in references:
        finish(process)
    for module in ("meta", "hf"):
        bench.add("oracle", f"ops_{module}", "base.hf", prompts)
        bench.runs["oracle"][-1] += ["--ops", str(bench.root / "out" / f"{module}.base_hf")]
    finish(bench.start("oracle"))
    return bench


def write_checkpoints(root: Path) -> None:
    for name, shape in SHAPES.items():
        weights = make_weights(shape)
        write_hf(root / f"{name}.hf", shape, weights, files=2 if name == "tied" else 1, old_rope=name == "factor32")
        if not shape.tied:
            llama2 = name == "llama2"
            write_meta(root / f"{name}.meta", shape, weights, shards=2 if llama2 else 1, llama2=llama2)
    weights = make_weights(SHARDED)
    for shards in (1, 2, 8, 16):
        write_meta(root / f"sharded{shards}", SHARDED, weights, shards=shards)


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def together(taps: dict[str, Tensor], tap: str) -> Tensor:
    """A tap at all positions of all sequences."""
    return torch.cat([value.flatten().double() for key, value in sorted(taps.items()) if key.split("/")[1] == tap])


def rho(candidate: Tensor, reference: Tensor, oracle: Tensor, dtype: str) -> float:
    return rms(candidate - oracle) / max(rms(reference - oracle), UNIT[dtype] * rms(oracle) / 2)


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert different == []


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, dtype) for name in SHAPES for dtype in UNIT if dtype != "fp16"), ("base", "fp16")]
)
def test_meta_and_transformers_agree_within_the_noise_floor(bench: Bench, name: str, dtype: str) -> None:
    meta, hf, oracle = (bench.taps(f"{module}.{name}", dtype) for module in ("meta", "hf", "oracle"))
    if name == "base":  # that run went on with generated tokens
        meta, hf = bench.taps("meta.base_hf", dtype), bench.taps("hf.base_hf", dtype)
    assert meta.keys() == hf.keys() == oracle.keys()
    for tap in sorted({key.split("/")[1] for key in oracle}):
        values = together(meta, tap), together(hf, tap), together(oracle, tap)
        bound = 2 if tap == "logits" else 3
        assert rho(*values, dtype) <= bound, tap
        assert rho(values[1], values[0], values[2], dtype) <= bound, tap


@pytest.mark.parametrize("module", ["meta", "hf"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_streamed_is_bitwise_whole_in_either_format(bench: Bench, module: str, dtype: str) -> None:
    whole = bench.taps(f"{module}.base_hf", dtype)
    assert_identical(bench.taps(f"{module}.streamed", dtype), whole)
    assert_identical(bench.taps(f"{module}.streamed_hf", dtype), whole)
    assert bench.trace(f"{module}.streamed")["streamed"][dtype] is True
    assert bench.trace(f"{module}.base_hf")["streamed"][dtype] is False


@pytest.mark.parametrize("module", ["meta", "hf"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["shards2", "shards8", "shards16", "shards16_streamed"])
def test_shards_are_bitwise_the_unsharded_model(bench: Bench, module: str, dtype: str, name: str) -> None:
    assert_identical(bench.taps(f"{module}.{name}", dtype), bench.taps(f"{module}.shards1", dtype))
    assert bench.trace(f"{module}.{name}")["weights"] == bench.trace(f"{module}.shards1")["weights"]


@pytest.mark.parametrize("module", ["meta", "hf"])
@pytest.mark.parametrize("name", ["factor32", "llama2"])
def test_metas_files_give_the_bits_of_hugging_faces(bench: Bench, module: str, name: str) -> None:
    for dtype in ("fp32", "bf16"):
        assert_identical(bench.taps(f"{module}.{name}_meta", dtype), bench.taps(f"{module}.{name}", dtype))
    one, other = bench.trace(f"{module}.{name}_meta"), bench.trace(f"{module}.{name}")
    assert one["config"] == other["config"]
    assert one["weights"] == other["weights"]


@pytest.mark.parametrize("name", ["base_hf", "tied", "factor32_meta", "llama2_meta"])
def test_config_and_weight_hashes_are_the_same_to_both(bench: Bench, name: str) -> None:
    meta, hf = bench.trace(f"meta.{name}"), bench.trace(f"hf.{name}")
    assert meta["config"] == hf["config"]
    assert meta["weights"] == hf["weights"]
    assert ("output.weight" in meta["weights"]) is not meta["config"]["tied"]


@pytest.mark.parametrize("name", SHAPES)
def test_rope_tables_agree_within_an_ulp(bench: Bench, name: str) -> None:
    tables = [bench.rope(f"{module}.{name}") for module in ("meta", "hf", "oracle")]
    for table in tables:
        assert table["cos"].shape == (len(ROPE_POSITIONS), SHAPES[name].head_dim // 2)
        for key in ("cos", "sin"):
            assert float((table[key] - tables[2][key]).abs().max()) <= 2**-23  # one ulp of 1.0


def test_other_scaling_than_metas_is_an_erratum(bench: Bench) -> None:
    assert bench.trace("meta.base")["errata"] == []
    assert len(bench.trace("meta.factor32")["errata"]) == 1
    assert "32" in bench.trace("meta.factor32_meta")["errata"][0]
    assert bench.trace("hf.factor32")["errata"] == []
    assert not torch.equal(bench.rope("meta.factor32")["cos"], bench.rope("meta.base")["cos"])


@pytest.mark.parametrize("module", ["meta", "hf"])
def test_greedy_tokens_are_the_argmax_of_the_recorded_logits(bench: Bench, module: str) -> None:
    trace, taps = bench.trace(f"{module}.base"), bench.taps(f"{module}.base", "fp32")
    assert trace["generated_by"] == "fp32"
    for s, (sequence, length) in enumerate(zip(trace["sequences"], trace["prompt_lengths"], strict=True)):
        assert len(sequence) == length + 5
        assert taps[f"{s}/logits"][length - 1 : -1].argmax(-1).tolist() == sequence[length:]


def test_both_continue_alike_in_fp32(bench: Bench) -> None:
    assert bench.trace("meta.base")["sequences"] == bench.trace("hf.base")["sequences"]


@pytest.mark.parametrize("module", ["meta", "hf"])
def test_a_dtype_over_the_limit_is_streamed_and_another_generates(bench: Bench, module: str) -> None:
    trace = bench.trace(f"{module}.auto")  # the model is 740 kB in fp32, 370 kB in bf16
    assert trace["streamed"] == {"fp32": True, "bf16": False}
    assert trace["generated_by"] == "bf16"
    assert {key.split("/")[1] for key in bench.taps(f"{module}.auto", "fp32")} == {"logits"}


@pytest.mark.parametrize("module", ["meta", "hf", "oracle"])
def test_taps_at_positions_are_rows_of_the_whole(bench: Bench, module: str) -> None:
    kept = bench.taps(f"{module}.positions", "bf16")
    full = bench.taps("oracle.base" if module == "oracle" else f"{module}.base_hf", "bf16")
    for key, value in kept.items():
        sequence = int(key.split("/")[0])
        rows = full[key] if key.endswith("/logits") else full[key][[[0], [], [3, 60]][sequence]]
        assert torch.equal(value, rows.to(value.dtype)), key
    assert kept["0/logits"].dtype == {"meta": torch.float32, "hf": torch.bfloat16, "oracle": torch.float64}[module]


def test_oracle_shares_a_folder_where_weights_survive_the_rounding(bench: Bench) -> None:
    assert bench.trace("oracle.base")["dtypes"] == {"fp32": "fp32", "bf16": "fp32", "fp16": "fp16"}
    assert all(value.dtype == torch.float64 for value in bench.taps("oracle.base", "bf16").values())
    assert_identical(bench.taps("oracle.base_meta", "bf16"), bench.taps("oracle.base", "bf16"))


@pytest.mark.parametrize("module", ["meta", "hf"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operations_on_a_traces_own_inputs_differ_by_one_rounding(bench: Bench, module: str, dtype: str) -> None:
    ops, taps = bench.taps(f"oracle.ops_{module}", dtype), bench.taps(f"{module}.base_hf", dtype)
    assert ops.keys() == taps.keys()
    for tap in sorted({key.split("/")[1] for key in ops}):
        error = rms(together(taps, tap) - together(ops, tap)) / rms(together(ops, tap))
        assert error <= 8 * UNIT[dtype], tap
    free = together(bench.taps("oracle.base", dtype), "logits")
    drift = rms(together(taps, "logits") - free) / rms(free)
    single = rms(together(taps, "logits") - together(ops, "logits")) / rms(free)
    assert single < drift / 3  # errors of earlier operations are not held against the head
    assert math.isfinite(drift)
