"""parity.synth --dim, --heads, ...: seeded checkpoints of any size, which every reader opens as they were meant."""

from pathlib import Path

import pytest
import torch

from nanollama.checkpoint import open_checkpoint
from parity.candidates.nano.model import exact
from parity.synth.checkpoint import main

ODD = ["--layers", "1", "--dim", "96", "--heads", "6", "--kv_heads", "3", "--eps", "1e-6", "--vocab", "500"]


@pytest.mark.parametrize("kind", ["meta", "hf"])
@pytest.mark.parametrize(("hidden", "wanted"), [(None, 256), (200, 200), (77, 77), (1000, 1000)])
def test_any_size_is_written_and_read(kind: str, hidden: int | None, wanted: int, tmp_path: Path) -> None:
    flags = [] if hidden is None else ["--hidden", str(hidden)]
    assert main([*ODD, *flags, "--format", kind, "--out", str(tmp_path / "c")]) == 0
    config = open_checkpoint(tmp_path / "c").config
    assert (config.dim, config.n_heads, config.n_kv_heads, config.head_dim) == (96, 6, 3, 16)
    assert (config.hidden_dim, config.vocab_size, config.norm_eps) == (wanted, 500, 1e-6)
    assert not (tmp_path / "c" / "tokenizer.model").exists()
    assert exact(str(tmp_path / "c"), torch.float32, "cpu")(torch.tensor([[1, 2, 3]])).shape == (1, 3, 500)


def test_a_head_dim_of_its_own_is_hugging_faces_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*ODD, "--head_dim", "32", "--out", str(tmp_path / "c")]
    assert main(flags) == 2 and "--format hf" in capsys.readouterr().err
    assert main([*flags, "--format", "hf"]) == 0
    assert open_checkpoint(tmp_path / "c").config.head_dim == 32
    assert exact(str(tmp_path / "c"), torch.float32, "cpu")(torch.tensor([[1, 2]])).isfinite().all()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dim 100", "--dim 100: dim 100 is not a multiple of 8 heads"),
        ("--heads 7", "--heads 7: 7 heads are not a multiple of 2 kv heads"),
        ("--dim 24", "head_dim 3: expected an even number"),
        ("--vocab 0", "vocab_size is 0"),
        ("--eps -1", "norm_eps is -1.0"),
        ("--hidden many", "invalid int value: 'many'"),
    ],
)
def test_sizes_that_make_no_model_are_one_line(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: int | str | None = main([*flags.split(), "--out", str(tmp_path / "c")])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()
