"""python -m parity.kit at its edges: a port in C with planted mistakes, damaged kits, usage errors."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kit_cases
from kit_cases import check
from parity.contract import UsageError
from parity.kit import make as command

SOURCE = Path(__file__).parents[1] / "ports" / "kit_port.c"


@pytest.fixture(scope="module")
def kit() -> Path:
    return kit_cases.made()[1]


def compiled(out: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: install gcc or clang")
    subprocess.run([compiler, *flags, "-o", str(out), str(SOURCE), "-lm"], check=True)
    return out


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("c") / "kit_port", "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror")


def run(program: Path, kit: Path, out: Path, *mistake: str) -> tuple[int, str]:
    out.mkdir()
    done = subprocess.run([program, kit, out, *mistake], capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("which", ["made", "rounded"])
def test_a_right_port_in_c_passes_by_itself_and_by_the_check(
    which: str, program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = getattr(kit_cases, which)()[1]
    code, text = run(program, kit, tmp_path / "out")
    assert code == 0 and text.startswith("PASS: 33 arrays within their bounds")
    code, report = check(kit, {}, tmp_path / "out")
    assert (code, report["verdict"]) == (0, "pass")
    assert {r["check"] for r in report["results"] if r["status"] == "pass"} >= {"taps", "logits", "argmax", "rope"}
    assert max(r["value"] for r in report["results"] if r["gate"] == "G3" and r["status"] == "pass") < 2
    assert "not covered  training: train.loss.f32 is missing, and 46 more" in capsys.readouterr().out


def test_other_sums_of_the_same_terms_pass(kit: Path, tmp_path: Path) -> None:
    """A compiler that may reorder sums makes another right port. (-ffast-math as a whole makes a wrong RoPE table.)"""
    flags = ("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
    code, text = run(compiled(tmp_path / "reordered", *flags), kit, tmp_path / "out")
    assert code == 0 and text.startswith("PASS")
    assert check(kit, {}, tmp_path / "out")[0] == 0


MISTAKES = [  # the tap that NUMERICS' table of mutants names, and words of the cause
    ("theta", "layers.0.q_rope", "10,000"),
    ("scaling", "layers.0.q_rope", "scaling of the checkpoint is dropped"),
    ("eps", "layers.0.attn_norm", "eps looks like 1e-06"),
    ("swapped", "layers.0.gate", "gate and up swapped"),
    ("heads", "layers.0.attn_mix", "kv heads in turn"),
    ("mask", "layers.0.attn_mix", "off by one"),
    ("pairing", "layers.0.q_rope", "RoPE pairs features j and j + D/2"),
    ("bf16", "layers.0.q", "every number is one of bf16"),
    ("document", "layers.0.attn_mix", "attention crosses documents"),
    ("scale", "layers.0.attn_mix", "not divided by sqrt(head_dim)"),
    ("residual", "layers.0.out", "residual"),
    ("nan", "logits", "output head"),
]


@pytest.mark.parametrize(("mistake", "tap", "cause"), MISTAKES)
def test_a_wrong_port_in_c_fails_where_it_is_wrong(
    mistake: str, tap: str, cause: str, kit: Path, program: Path, tmp_path: Path
) -> None:
    code, text = run(program, kit, tmp_path / "out", mistake)
    assert code == 1 and text.endswith(f"first at {tap}\n")
    code, report = check(kit, {}, tmp_path / "out")
    assert (code, report["verdict"], report["first_divergence"]["tap"]) == (1, "fail", tap)
    assert cause in report["first_divergence"]["probable_cause"]


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of an exit with code 2, before or after work."""
    try:
        code: int | str | None = command.main([str(part) for part in argv])
    except SystemExit as stop:
        code = stop.code
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["kit.json", "kit.txt", "weights.f32", "inputs.i32", "expected.f64"])
@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-8])], ids=["bit", "gone", "short"]
)
def test_a_damaged_kit_is_refused(
    name: str, damage: Callable[[Path], None], kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(kit, tmp_path / "kit")
    damage(copied / name)
    error = refused(capsys, "--check", copied, "--port", tmp_path)
    assert name in error or (name, "is no kit" in error) == ("kit.json", True)


@pytest.mark.parametrize("manifest", [None, "", "0" * 64 + "  README.md\n"])
def test_a_kit_without_its_sums_is_refused(
    manifest: str | None, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(kit, tmp_path / "kit")
    (copied / "SHA256SUMS").unlink()
    if manifest is not None:
        (copied / "SHA256SUMS").write_text(manifest)
    refused(capsys, "--check", copied, "--port", tmp_path)


def test_files_and_dtypes_that_the_kit_does_not_know_are_refused(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "layer.0.q.f32").write_bytes(bytes(4))
    assert "did you mean layers.0.q.f32?" in refused(capsys, "--check", kit, "--port", tmp_path)
    assert "the kit has bounds for fp32, bf16" in refused(
        capsys, "--check", kit, "--port", SOURCE.parent, "--dtype", "fp16"
    )


BAD_USAGE = [
    ([], "--out DIR"),
    (["--out", "x", "--check", "y"], "either"),
    (["--ou", "x"], "did you mean --out?"),
    (["--out", "x", "--dtype", "fp8"], "fp8"),
    (["--out", "x", "--port", "y"], "--port"),
    (["--out", "x", "--prompts", "/nowhere.txt"], "/nowhere.txt"),
    (["--out", "x", "--ckpt", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--out", "/proc/nowhere/x"], "/proc/nowhere/x"),
    (["--check", "/nowhere", "--port", "."], "is no kit"),
    (["--check", "/nowhere"], "--port"),
    (["--check", "x", "--port", ".", "--dtype", "fp32,bf16"], "with --check one"),
    (["--check", "x", "--port", ".", "--ckpt", "y"], "--ckpt"),
    (["--check", "x", "--port", ".", "--json", "/nowhere/at/all.json"], "/nowhere/at/all.json"),
]


@pytest.mark.parametrize(("argv", "named"), BAD_USAGE)
def test_bad_usage_is_one_line_and_exit_code_2(
    argv: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("parity.run.runner.Runner.run_references", lambda self: pytest.fail("work was started"))
    assert named in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_refused_and_a_failed_run_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise UsageError("the oracle is out")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "not empty" in refused(capsys, "--out", tmp_path / "full")
    monkeypatch.setattr("parity.run.runner.Runner.run_references", fail)
    assert "the oracle is out" in refused(capsys, "--out", tmp_path / "kit")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_weights_that_two_readers_read_differently_are_refused() -> None:
    from parity.candidates.nano.checkpoint import float32_weights

    source = kit_cases.made()[0]
    hashes = source.evidence.references["meta"].meta["weights"]
    wrong = {**hashes, "norm.weight": hashes["norm.weight"] | {"crc32": 0}}
    with pytest.raises(UsageError, match=r"norm\.weight is read differently"):
        dict(float32_weights(source.checkpoint, wrong))
    assert torch.equal(dict(float32_weights(source.checkpoint, hashes))["norm.weight"], torch.load(
        source.checkpoint.path / "consolidated.00.pth", weights_only=True)["norm.weight"].float())  # fmt: skip


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_before_a_reference_is_imported(flag: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "parity.kit", flag], capture_output=True, text=True, check=True
    )
    assert "parity" in done.stdout and "transformers" not in done.stderr
