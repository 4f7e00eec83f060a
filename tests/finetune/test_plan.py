"""finetune.plan: what is traced without memory, held against runs that have some."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard

import tiny
from finetune import plan, trace
from finetune.config import TrainConfig
from finetune.mesh import MeshSizes
from finetune.trace import Traced, trace_step
from finetune.tracker import Kind, StepTracker, sent_bytes
from nanollama.cli import execute
from nanollama.model import ModelConfig
from peaks import measured_peak

ALONE = MeshSizes()
SMALL = ModelConfig(dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=4000, hidden_dim=352, max_seq_len=512)
LARGER = replace(SMALL, dim=320, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=8000, hidden_dim=880)
WITHIN = 0.10  # of the measured peak


def config(**changes: Any) -> TrainConfig:
    chosen = {"seq_len": 128, "batch_size": 4, "lr": 1e-3, "max_steps": 10, "warmup_steps": 0, "eval_tokens": 1}
    return TrainConfig(**{**chosen, **changes})


def peak(traced: Traced) -> int:
    return max(moment.total() for moment in traced.moments.values())


def departure(shape: ModelConfig, chosen: TrainConfig, sizes: MeshSizes) -> float:
    """Of the plan from the measured peak, as a share of that."""
    return peak(trace_step(shape, chosen, sizes, gpu=False)) / measured_peak(shape, chosen, sizes) - 1


def test_a_plan_is_near_the_measured_peak() -> None:
    assert abs(departure(SMALL, config(), ALONE)) < WITHIN / 2  # without peers: no buffers of theirs


def test_a_tracker_that_forgets_the_loss_is_not_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StepTracker._track

    def forget(self: StepTracker, kind: Any, tensor: torch.Tensor) -> None:
        if kind is not Kind.LOSS:
            plain(self, kind, tensor)

    monkeypatch.setattr(StepTracker, "_track", forget)
    assert departure(SMALL, config(), ALONE) < -WITHIN


CONFIGURATIONS: dict[str, tuple[dict[str, Any], MeshSizes]] = {
    "full": ({}, ALONE),
    "bf16": ({"dtype": "bf16"}, ALONE),
    "bf16 weights": ({"weights": "bf16", "dtype": "bf16"}, ALONE),
    "moments in bytes": ({"optimizer": "adamw8bit"}, ALONE),
    "optimizer in backward": ({"optimizer_in_backward": True, "grad_clip": 0.0}, ALONE),
    "bf16, activation checkpointing, accumulation": (
        {"dtype": "bf16", "activation_checkpointing": True, "accumulate": 2},
        ALONE,
    ),
    "lora without document mask": ({"method": "lora", "doc_mask": "off", "seq_len": 256}, ALONE),
    "two copies": ({}, MeshSizes(dp=2)),
    "two shards, activation checkpointing": ({"activation_checkpointing": True}, MeshSizes(fsdp=2)),
    "two parts": ({"dtype": "bf16"}, MeshSizes(tp=2)),
    "two shards of two parts, lora": ({"method": "lora"}, MeshSizes(fsdp=2, tp=2)),
    "four shards, bf16": ({"dtype": "bf16"}, MeshSizes(fsdp=4)),
    "two copies of two shards": ({}, MeshSizes(dp=2, fsdp=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_plan_of_each_kind_of_run_is_near_its_measured_peak(name: str) -> None:
    changes, sizes = CONFIGURATIONS[name]
    assert abs(departure(LARGER, config(**{"seq_len": 256, **changes}), sizes)) < WITHIN


@pytest.mark.parametrize("sizes", [ALONE, pytest.param(MeshSizes(dp=2, fsdp=4), marks=pytest.mark.slow)])
def test_other_depths_and_batches_follow_from_those_that_are_traced(sizes: MeshSizes) -> None:
    shape, chosen = replace(SMALL, n_layers=7), config(batch_size=2, seq_len=64)
    planned = plan.plan_step(shape, chosen, sizes, gpu=True).grid.moments(5)
    traced = trace_step(shape, replace(chosen, batch_size=5), sizes, gpu=True).moments
    assert planned.keys() == traced.keys()
    for name, moment in traced.items():
        assert planned[name].total() == pytest.approx(moment.total(), rel=0.005), name


def test_states_of_shards_are_counted_as_shards() -> None:
    whole, part = (trace_step(SMALL, config(), MeshSizes(fsdp=n), gpu=False).moments["update"] for n in (1, 8))
    assert part[Kind.STATES] == pytest.approx(whole[Kind.STATES] / 8, rel=0.01)
    assert part[Kind.WEIGHTS] == pytest.approx(whole[Kind.WEIGHTS] / 8, rel=0.01)


def bytes_of_a_state_like_shards(rows: int) -> int:
    """Of 8 shards of (rows, 1000) fp32 and a state of the same shape, at the worst instant, on one of 8 ranks.

    rows: another number each time, since DTensor remembers what it has worked out.
    """
    with trace.fake_world(MeshSizes(fsdp=8)) as world:
        assert world.mesh is not None
        mesh = world.mesh["fsdp"]
        with FakeTensorMode(allow_non_fake_inputs=True), StepTracker() as tracker:
            weight = DTensor.from_local(torch.empty(rows, 1000), mesh, [Shard(0)], run_check=False)
            torch.zeros_like(weight)
    return tracker.moments["build"].total()


def test_shapes_that_dtensor_works_out_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_of_a_state_like_shards(31) == 2 * 31 * 1000 * 4
    monkeypatch.setattr(StepTracker, "_shapes_apart", lambda self: nullcontext())
    assert bytes_of_a_state_like_shards(37) > 8 * 37 * 1000 * 4  # the whole state: torch's tracker as it is


def test_what_is_sent_is_what_the_algorithms_send() -> None:
    assert [sent_bytes(name, 800, 8) for name in ("all_gather", "reduce_scatter", "all_reduce")] == [
        700, 700, 1400,
    ]  # fmt: skip
    chosen = config(batch_size=1, seq_len=32)
    blocks = 3 * 4 * sum(p.numel() for p in tiny_block().parameters())
    around = 4 * (2 * 4000 * 128 + 128)
    sent = trace_step(SMALL, chosen, MeshSizes(fsdp=4), gpu=False).sent
    # Blocks are gathered for the forward and for the backward pass, what is around them once.
    assert sent["all_gather", 4] == pytest.approx(0.75 * (2 * blocks + around), rel=0.01)
    assert sent["reduce_scatter", 4] == pytest.approx(0.75 * (blocks + around), rel=0.01)
    copies = trace_step(SMALL, chosen, MeshSizes(dp=4), gpu=False).sent
    assert copies["all_reduce", 4] == pytest.approx(1.5 * (blocks + around), rel=0.01)


def tiny_block() -> torch.nn.Module:
    with torch.device("meta"):
        return trace.Transformer(SMALL).layers[0]


def test_the_command_says_memory_the_largest_batch_and_traffic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "plan.json"
    line = "--init 260K --gpus 2 --mesh dp=2 --seq_len 32 --batch_size 1 --dtype bf16 --json"
    assert execute(plan.main, [*line.split(), str(found)]) == 0
    said = capsys.readouterr().out
    assert "planned, not measured: 260K (" in said
    assert "--method full, --dp 2 --fsdp 1 --tp 1" in said
    assert "all_reduce 0.00104 GB over 2 ranks" in said
    written = json.loads(found.read_text())
    assert written["sent_bytes"]["all_reduce over 2"] == pytest.approx(4 * 260_032, rel=0.001)
    assert written["total_bytes"] == sum(written["bytes"].values())
    assert written["largest_batch_size"]["24"] < written["largest_batch_size"]["80"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--gpus 0", "--gpus 0: expected at least 1"),
        ("--gpus 8 --mesh fsdp=3", "make 6 processes, and there are 8"),
        ("--gpus 8 --mesh shards=8", "expected dp=N,fsdp=N,tp=N"),
        ("--gpus 8 --mesh fsdp=8 --fsdp 4", "--mesh fsdp=8 and --fsdp: say it once"),
        ("--shape 8B --init 15M", "--shape and --init together"),
        ("--shape 8B --seq_len 200000", "made for at most 131072 tokens"),
        ("--shape 8B --method qlora", "plan --method lora"),
        ("--shape 8B --method lora --adapter out/adapter", "give its --lora_rank"),
        ("--shape 8B --gpus 2 --mesh fsdp=2 --optimizer adamw8bit", "use --optimizer adamw"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    flags: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(plan.main, flags.split()) == 2
    assert why in capsys.readouterr().err


def test_a_batch_of_the_largest_size_fits_and_one_row_more_does_not() -> None:
    planned = plan.plan_step(tiny.config(n_layers=2), config(batch_size=1), ALONE, gpu=True)
    limit = 50e6
    rows = planned.grid.largest(limit)
    fullest = [max(m.total() for m in planned.grid.moments(r).values()) for r in (rows, rows + 1)]
    assert fullest[0] <= limit < fullest[1]


@pytest.mark.slow
def test_the_page_on_scale_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    [shown] = [block for block in page.split("```") if "--shape 8B --gpus 8" in block and "planned, not" in block]
    line, *printed = shown.strip().splitlines()
    assert execute(plan.main, line.removeprefix("$ python -m finetune.plan ").split()) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == printed  # the last line is how long it took
