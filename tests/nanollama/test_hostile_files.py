"""Files of strangers on both ways, ours and the reference's: each is refused in one line that names what was found."""

import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from hostile import link, pipe, write
from hostile_files import FILES
from nanollama.checkpoint import CheckpointError, open_checkpoint, verify, write_bin
from nanollama.gate import reason, shown
from reference.files import open_folder
from reference.files.weights import Unusable

LIMIT_S = 20  # of CPU: a bound on hanging, and none on speed


def make(folder: Path, kind: str) -> Path:
    found = write(folder / "model", FILES[kind].format)
    FILES[kind].make(found)
    return found


def check_line(said: str, part: str) -> None:
    assert re.search(part, said), said
    assert "\n" not in said and len(said) < 900
    assert not re.search(r"weights_only|trust_remote_code|safe_globals", said), said


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_file_is_refused_on_both_ways(kind: str, tmp_path: Path) -> None:
    folder, case, started = make(tmp_path, kind), FILES[kind], time.process_time()
    with pytest.raises(CheckpointError) as ours:
        open_checkpoint(folder)
    check_line(str(ours.value), case.part)
    with pytest.raises(Unusable) as theirs:
        open_folder(folder)
    check_line(str(theirs.value), case.other or case.part)
    assert time.process_time() - started < LIMIT_S


# One of each effect that the files had: hanging, filling the memory, ending the interpreter, many lines.
IN_PROCESSES = (
    ("a deflate bomb", "a bytearray of 3 GB", "a key of nested tuples", "tuples 10^5 deep", "a storage of 2^70 numbers")
    + ("a pickle that calls os.system", "a shard that is a pipe", "two data.pkl", "params.json 10^5 deep")
    + ("config.json a pipe", "config.json an endless device", "config.json 60,000 unknown keys")
)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["nanollama", "reference.hf"])
@pytest.mark.parametrize("kind", IN_PROCESSES)
def test_a_hostile_file_ends_a_process_with_one_line(kind: str, module: str, tmp_path: Path) -> None:
    """60 s of CPU, 4 GiB."""
    folder = make(tmp_path, kind)
    line = ["inspect", str(folder)] if module == "nanollama" else ["--ckpt", str(folder), "--prompt", "x"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    done = subprocess.run(
        [sys.executable, "-m", module, *line], capture_output=True, text=True, timeout=600, preexec_fn=limit
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    said = done.stderr.splitlines()  # libraries may talk while they are imported; the line is the last
    assert said[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert [line.startswith("error: ") for line in said].count(True) == 1


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_a_manifest_that_names_no_file_is_refused(target: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "hf")
    link(folder / "x", target) if target.startswith("/") else pipe(folder / "x")
    (folder / "SHA256SUMS").write_text("0" * 64 + "  x\n")
    with pytest.raises(CheckpointError, match=r"x: is a (device|pipe) and not a file"):
        verify(folder)
    pipe(folder / "SHA256SUMS")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: is a pipe"):
        verify(folder)


def test_a_claimed_context_takes_no_memory() -> None:
    claims = tiny.model(max_seq_len=2**31 - 1)
    honest, tokens = tiny.model(), torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(claims(tokens), honest(tokens))
        claims(tokens, positions=torch.full((1, 9), 200_000))
    assert claims._rope is not None and claims._rope[0].shape[0] == 1 << 18  # twice as long, for what is used
    with pytest.raises(CheckpointError, match="max_seq_len is 2,147,483,647"):
        write_bin(Path("x.bin"), replace(claims.config, rope_theta=1e4), dict(claims.state_dict()))


def test_the_blobs_of_the_hub_cache_are_inside(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "main", tmp_path / "cache" / "blobs"
    write(snapshot, "hf")
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert open_checkpoint(snapshot).format == open_folder(snapshot).format == "hf"


def test_libraries_advice_to_load_unsafely_is_not_repeated() -> None:
    said = (
        "Weights only load failed. In PyTorch 2.6, we changed the default value of the `weights_only` argument.\n"
        "Re-running `torch.load` with `weights_only` set to `False` will likely succeed."
    )
    assert reason(ValueError(said)) == "Weights only load failed."
    assert "trust" not in reason(ValueError("It holds code. Please pass the argument `trust_remote_code=True`"))
    assert len(shown("x" * 10**7)) < 80
