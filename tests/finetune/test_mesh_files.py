"""What a distributed run writes is what one process writes and reads, and each rank reads its own part of a file."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.build import fresh_weights
from finetune.lora import merged_weights
from finetune.resume import Progress, RunFolder
from mesh_cases import ALONE, SHAPE, Mesh, make_config, make_model
from mesh_files import answer_in_training, answers, fill_large, run_steps, states, work
from nanollama.checkpoint import open_checkpoint, write_meta
from nanollama.generation.llama import Llama
from nanollama.generation.parallel import load_parallel
from rank_group import run_ranks

MESHES = {"fsdp": Mesh(), "tp": Mesh(), "tp lora": Mesh(method="lora")}  # as one process runs them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two files, and a run of each kind that one process has saved."""
    folder = tmp_path_factory.mktemp("ranks")
    write_meta(folder / "checkpoint", dataclasses.replace(SHAPE, vocab_size=62), wide(), shards=2)
    for name, mesh in MESHES.items():
        model, optimizer = run_steps(mesh, ALONE, 2)
        RunFolder(folder / f"{name} alone", make_config(mesh)).save(Progress(2), model, optimizer, "data")
    return folder


def wide() -> dict[str, torch.Tensor]:
    """Weights with an even vocabulary, so that Meta's files can share it."""
    return {n: torch.cat([w, w[:1]]) if w.shape[0] == 61 else w for n, w in make_model(Mesh()).state_dict().items()}


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, work, folder)


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("name", MESHES)
def test_one_process_resumes_what_ranks_have_saved(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    mesh = MESHES[name]
    model, optimizer = run_steps(mesh, ALONE, 0, RunFolder(folder / name, make_config(mesh)))
    assert_equal(states(model, optimizer), ranks[0][f"{name} states"])


@pytest.mark.parametrize("name", MESHES)
def test_ranks_resume_what_one_process_has_saved(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    mesh = MESHES[name]
    model, optimizer = run_steps(mesh, ALONE, 0, RunFolder(folder / f"{name} alone", make_config(mesh)))
    for rank in ranks:
        assert_equal(rank[f"{name} restored"], states(model, optimizer))


@pytest.mark.parametrize("name", MESHES)
def test_the_final_model_of_ranks_is_whole(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    model = make_model(MESHES[name])
    model.load_state_dict(ranks[0][f"{name} weights"], strict=True)
    written = open_checkpoint(folder / f"{name} final")
    assert written.config.vocab_size == SHAPE.vocab_size
    assert_equal(dict(written.weights), merged_weights(model))


@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_each_rank_reads_its_own_part(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    stored = open_checkpoint(folder / "checkpoint").weights
    numbers = sum(w.numel() for w in wide().values())
    for rank in ranks:
        filled = rank[f"{name} filled"]
        assert_equal(filled["weights"], dict(stored))
        assert filled["own"] < 0.52 * numbers
        # Whole rows are looked at where columns are cut (wo and w2), of which only its columns are copied.
        assert filled["read"] == (filled["own"] if name == "fsdp" else filled["own"] + cut_columns() // 2)


@pytest.mark.slow
def test_a_rank_has_no_more_than_its_share_in_memory(folder: Path) -> None:
    shape = dataclasses.replace(SHAPE, dim=512, n_layers=3, hidden_dim=1536, vocab_size=16000, head_dim=0)
    weights = fresh_weights(shape, torch.Generator().manual_seed(0))
    write_meta(folder / "large", shape, weights, shards=2, dtype=torch.bfloat16)
    whole_bytes = 4 * sum(w.numel() for w in weights.values())
    found = run_ranks(4, fill_large, folder)
    assert found[0]["fsdp"] > 0.2 * whole_bytes  # it is seen; what comes second may find memory that the first has left
    for rank in found:
        # A matrix that lies in two files is merged as it is read, a block of rows at a time.
        assert max(rank["fsdp"], rank["fsdp x tp"]) < 0.4 * whole_bytes, (rank, whole_bytes)


def cut_columns() -> int:
    return SHAPE.n_layers * SHAPE.dim * (SHAPE.dim + SHAPE.hidden_dim)


def test_generation_over_parts_gives_the_same_tokens(ranks: list[dict[str, Any]], folder: Path) -> None:
    expected = answers(Llama.load(folder / "checkpoint"))
    assert len(expected) == 48
    assert ranks[0]["generated"] == ranks[1]["generated"]
    for mine, theirs in zip(ranks[0]["generated"], expected, strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2] == pytest.approx(theirs[2], abs=1e-5)  # nats


@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_a_sample_in_training_is_drawn_by_all_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    expected = answer_in_training(MESHES[name], ALONE)
    for rank in ranks:
        assert [event[:2] for event in rank[f"{name} answers"]] == [event[:2] for event in expected]


def test_a_writer_that_fails_lets_the_others_go_on(ranks: list[dict[str, Any]]) -> None:
    assert [rank["failure"] for rank in ranks] == ["full", "went on"]


def test_a_number_of_processes_that_is_not_tp_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--tp 2 needs 2 processes, and there are 1: start torchrun"):
        load_parallel(folder / "checkpoint", 2)


def test_heads_that_cannot_be_shared_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="n_heads is 4, which 3 ranks cannot share evenly"):
        load_parallel(folder / "checkpoint", 3)
