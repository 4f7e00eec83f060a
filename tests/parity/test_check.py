"""parity.check through its command line: right ports pass, wrong ones are named, bad input is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parity.check import main
from parity.synth.checkpoint import synthesise
from parity.synth.shapes import SHAPES

PORT = Path(__file__).parents[1] / "ports" / "plain_port.py"
SMALL = replace(SHAPES["tiny"], vocab_size=1024, n_layers=2, n_heads=16, n_kv_heads=4)  # head_dim 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One seeded model in both formats, small vocabulary, no tokenizer."""
    folders = {name: tmp_path_factory.mktemp("ckpt") / name for name in ("meta", "hf")}
    for name, folder in folders.items():
        synthesise(SMALL, folder, format=name)
    return folders


def run(tmp_path: Path, *argv: str) -> tuple[int, dict]:
    out = tmp_path / "report.json"
    code = main([*argv, "--json", str(out)])
    return code, json.loads(out.read_text())


def test_nanollama_passes_in_both_formats_with_the_same_results(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    reports = {}
    for name, folder in checkpoints.items():
        code, reports[name] = run(tmp_path, "--ckpt", str(folder))
        assert code == 0, reports[name]["why"]
    meta, hf = reports["meta"], reports["hf"]
    assert (meta["verdict"], hf["verdict"]) == ("pass", "pass")
    assert [r["value"] for r in meta["results"]] == [r["value"] for r in hf["results"]]
    bitwise = [r for r in meta["results"] if r["check"] == "bitwise"]
    assert {r["dtype"] for r in bitwise} == {"fp32", "bf16"}
    assert all(r["value"] == 0 and r["status"] == "pass" for r in bitwise)
    assert {r["path"] for r in meta["results"] if r["check"] == "logits"} == {"exact", "fast"}
    assert {n["of"] for n in meta["noise_floor"]} == {"meta", "hf"}
    assert meta["tokens"]["longest"] >= 256 and meta["tokens"]["decided_fraction"] >= 0.5
    assert meta["peak_anonymous_bytes"] > 10**7 and 0 < meta["seconds_in_forward"] <= meta["seconds"]


@pytest.mark.parametrize(("attribute", "covered"), [("load", True), ("bare", False)])
def test_a_right_port_passes(attribute: str, covered: bool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    candidate = f"{PORT}:{attribute}"
    code, report = run(tmp_path, "--ckpt", str(checkpoints["meta"]), "--candidate", candidate, "--references", "meta")
    assert code == 0, report["why"]
    judged = {r["check"] for r in report["results"] if r["status"] == "pass"}
    assert {"logits", "kl", "argmax", "greedy"} <= judged and ("taps" in judged) == covered
    skipped = {r["check"] for r in report["results"] if r["status"] == "skip"}
    assert {"config", "weights", "rope", "cache", "bitwise"} <= skipped


@pytest.mark.parametrize(
    ("attribute", "tap"),
    [
        ("wrong_base", "layers.0.q_rope"),
        ("wrong_eps", "layers.0.attn_norm"),
        ("dropped_scaling", "layers.0.q_rope"),
        ("unpermuted", "layers.0.q"),
        ("swapped", "layers.0.gate"),
    ],
)
def test_a_wrong_port_fails_where_it_is_wrong(
    attribute: str, tap: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = ("--candidate", f"{PORT}:{attribute}", "--references", "meta", "--dtype", "fp32")
    code, report = run(tmp_path, "--ckpt", str(checkpoints["meta"]), *candidate)
    assert code == 1 and report["verdict"] == "fail"
    assert report["first_divergence"]["tap"] == tap
    assert report["first_divergence"]["layer"] == 0
    assert "divergence" in capsys.readouterr().out


def test_without_fp32_the_verdict_is_limited(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("--ckpt", str(checkpoints["meta"]), "--dtype", "bf16", "--references", "meta", "--max_new_tokens", "2")
    code, report = run(tmp_path, *arguments)
    assert (code, report["verdict"]) == (3, "limited")


def test_a_candidate_that_raises_is_a_failure(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "def load(c, d, v):\n    def model(tokens):\n        raise RuntimeError('no kernel')\n    return model\n"
    )
    arguments = ("--ckpt", str(checkpoints["meta"]), "--candidate", f"{broken}:load", "--references", "meta")
    code, report = run(tmp_path, *arguments, "--dtype", "fp32")
    assert code == 1
    assert any(r["status"] == "error" and "no kernel" in r["reason"] for r in report["results"])


BAD_INPUT = [
    (["--max_new_token", "3"], "unknown flag --max_new_token; did you mean --max_new_tokens?"),
    (["--dtype", "fp8"], "fp8"),
    (["--checks", "logit"], "logit"),
    (["--references", "jax"], "jax"),
    (["--ckpt", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--ckpt", "no-such-org/no-such-model"], "no-such-org/no-such-model"),
    (["--candidate", "nowhere.py:load"], "nowhere.py"),
    (["--candidate", "torch:no_such_name"], "no_such_name"),
    (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
    (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json"),
    (["--max_new_tokens", "many"], "many"),
    (["--device", "tpu"], "tpu"),
]


@pytest.mark.parametrize(("argv", "named"), BAD_INPUT)
def test_bad_usage_is_one_line_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parity.run.runner.Runner.run", lambda self: pytest.fail("work was started"))
    try:
        code: int | str | None = main(argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


def test_a_hub_id_is_found_in_the_hubs_own_cache(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoints["hf"], model / "snapshots" / ("0" * 40))
    arguments = ("--ckpt", "org/tiny", "--dtype", "fp32", "--references", "hf", "--checks", "config,logits")
    code, report = run(tmp_path, *arguments, "--max_new_tokens", "2")
    assert code == 0, report["why"]
    assert report["checkpoint"]["path"] == "org/tiny" and report["checkpoint"]["format"] == "hf"


def test_damaged_checkpoints_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoints["meta"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "consolidated.00.pth"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight: only the manifest can tell
    weights.write_bytes(content)
    assert main(["--ckpt", str(damaged)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "consolidated.00.pth" in error and "sha256" in error


def test_prompts_come_from_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tokens = tmp_path / "prompts.jsonl"
    tokens.write_text("[1, 2, 3]\n[7, 8]\n")
    arguments = ("--prompts", str(tokens), "--references", "hf", "--dtype", "fp32", "--max_new_tokens", "3")
    candidate = ("--candidate", f"{PORT}:bare")
    code, report = run(tmp_path, "--ckpt", str(checkpoints["meta"]), *candidate, *arguments)
    assert code == 0 and report["tokens"]["positions"] == 3 + 2 + 2 * 3
    tokens.write_text("[1, 2000]\n")
    assert main(["--ckpt", str(checkpoints["hf"]), "--prompts", str(tokens)]) == 2


def test_synth_gives_one_model_in_both_formats(checkpoints: dict[str, Path]) -> None:
    meta = torch.load(checkpoints["meta"] / "consolidated.00.pth", weights_only=True)
    hf = load_file(checkpoints["hf"] / "model.safetensors")
    assert torch.equal(meta["layers.1.feed_forward.w2.weight"], hf["model.layers.1.mlp.down_proj.weight"])
    wq = meta["layers.0.attention.wq.weight"].view(SMALL.n_heads, SMALL.head_dim // 2, 2, -1)
    assert torch.equal(wq.transpose(1, 2).flatten(0, 2), hf["model.layers.0.self_attn.q_proj.weight"])


def test_the_readme_example_runs(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    source = readme.split("```python\n")[1].split("```")[0]
    port = tmp_path / "my_port.py"
    port.write_text(source)
    arguments = ("--ckpt", str(checkpoints["hf"]), "--candidate", f"{port}:load", "--references", "meta")
    code, report = run(tmp_path, *arguments, "--dtype", "fp32")
    assert code == 0, report["why"]
