"""The table of public implementations: its registry, its rows, its page; one row through the whole harness."""

import ast
from pathlib import Path
from typing import Any

import pytest

from parity.peers import __main__ as command
from parity.peers import page, registry
from parity.peers import run as peers
from parity.peers.registry import PEERS, Peer

FOLDER = Path(registry.__file__).parent
PORT = Path(__file__).parents[1] / "ports" / "plain_port.py"
WRAPPERS = sorted({p.candidate for p in PEERS if p.candidate.startswith("parity.peers.")})
CLONED = next(p for p in PEERS if p.clone)


def result(check: str, metric: str, dtype: str, value: float, status: str = "pass", where: str = "") -> dict[str, Any]:
    return {"check": check, "metric": metric, "dtype": dtype, "value": value, "status": status, "where": where}


def report(*results: dict[str, Any], cause: str | None = None) -> dict[str, Any]:
    first = {"probable_cause": cause} if cause else None
    fields = {
        "quantized": [],
        "notices": ["RoPE table: coarse", "other"],
        "why": "why",
        "seconds": 2.0,
        "tokens": {"positions": 9},
    }
    return {"results": list(results), "first_divergence": first, **fields}


@pytest.mark.parametrize("candidate", WRAPPERS)
def test_a_wrapper_has_at_most_60_lines_and_the_function_that_its_row_names(candidate: str) -> None:
    module, attribute = candidate.split(":")
    source = (FOLDER / f"{module.rpartition('.')[2]}.py").read_text()
    assert len(source.splitlines()) <= 60
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    assert [a.arg for a in functions[attribute].args.args] == ["checkpoint", "dtype", "device"]


def test_every_row_has_its_own_name_a_known_checkpoint_and_a_reproduction_of_what_is_wrong() -> None:
    assert len({p.name for p in PEERS}) == len(PEERS) >= 20
    assert len({p.clone for p in PEERS if p.candidate.startswith("torch:")}) >= 5  # judged with no line written
    assert {p.checkpoint for p in PEERS} <= peers.CHECKPOINTS.keys()
    assert all(bool(p.finding) == bool(p.repeat) for p in PEERS)
    for peer in PEERS:
        compile(peer.repeat, peer.name, "exec")


def test_a_row_has_the_worst_of_both_references_by_dtype() -> None:
    found = report(
        result("logits", "rho", "fp32", 0.9),
        result("logits", "rho", "fp32", 5.0, "fail"),
        result("kl", "KL mean", "fp32", 7.0, "fail", "2.5e-09 nats for 1e-10"),
        result("logits", "rho", "bf16", 0.8),
        cause="eps",
    )
    row = peers.row(PEERS[0], found, "1.0")
    assert row.verdicts == {"fp32": "fail", "bf16": "pass"} and row.rho == {"fp32": 5.0, "bf16": 0.8}
    assert row.kl == {"fp32": 2.5e-9} and (row.cause, row.why) == ("eps", "")
    assert row.notices == ("RoPE table: coarse",)


def test_a_report_without_logits_is_no_pass() -> None:
    row = peers.row(PEERS[0], report(), "1.0")
    assert row.verdicts == {"fp32": "not covered", "bf16": "not covered"} and row.why == "why"


def test_a_peer_that_could_not_be_asked_was_not_run() -> None:
    died = report(result("logits", "rho", "fp32", 0.0, "error")) | {"tokens": {"positions": 0}, "why": "SIGILL"}
    row = peers.row(PEERS[0], died, "1.0")
    assert row.verdicts is None and row.why == "could not be run: SIGILL"


@pytest.mark.parametrize(
    ("finding", "verdict", "said"),
    [("", "pass", None), ("a bug", "fail", None), ("", "fail", "nothing is known"), ("a bug", "pass", "passes")],
)
def test_what_does_not_fit_the_table_is_news(finding: str, verdict: str, said: str | None) -> None:
    peer = Peer("x", "x", "nanollama", "3.1-meta", "torch", finding=finding)
    news = command.unexpected(peer, peers.Row("x", verdicts={"fp32": verdict}))
    assert (news is None) if said is None else said in str(news)


def test_a_missing_clone_is_a_row_that_says_how(tmp_path: Path) -> None:
    row = peers.run(CLONED, tmp_path, tmp_path, None)
    assert row.verdicts is None and f"git clone github.com/{CLONED.clone}" in row.why
    assert command.unexpected(CLONED, row) is None


def test_a_file_of_a_clone_is_the_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(peers, "check", lambda peer, *rest: asked.append(peer.candidate) or report())
    monkeypatch.setattr(peers, "made", lambda name, folder: folder / name)
    (tmp_path / "port").mkdir()
    peer = Peer("x", "x", "torch:{clone}/model.py:Llama", "3.1-meta", "port", "fp32", clone="someone/port")
    peers.run(peer, tmp_path, tmp_path, tmp_path)
    assert asked == [f"torch:{tmp_path}/port/model.py:Llama"]


def test_a_peer_that_cannot_be_run_is_a_row_with_its_last_words(tmp_path: Path) -> None:
    row = peers.run(Peer("x", "x", "nowhere.py:load", "3.1-meta", "torch", "fp32"), tmp_path, tmp_path, None)
    assert row.verdicts is None and "nowhere.py does not exist" in row.why


def test_an_unknown_row_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "no-such-peer"]) == 2
    assert capsys.readouterr().err.startswith("error: --only no-such-peer: no peer has this name")


def test_the_page_shows_failures_with_their_reproduction_and_rows_that_were_not_run() -> None:
    bad = next(p for p in PEERS if p.finding.startswith("**A bug**"))
    rows = {
        bad.name: peers.row(bad, report(result("logits", "rho", "fp32", 5.0, "fail"), cause="a|b"), "1.2").as_json()
    }
    rows[PEERS[0].name] = peers.Row(PEERS[0].name, why="needs a clone").as_json()
    made = page.markdown(rows, "torch 2")
    assert f"| `{bad.name}`: {bad.of} | 1.2 | FAIL |" in made and "a\\|b" in made
    assert "NOT RUN" in made and "needs a clone" in made
    assert f"### {bad.of}, 1.2\n\n{bad.finding}." in made and bad.repeat.strip().splitlines()[0] in made


def test_a_wrong_port_becomes_a_failed_row(tmp_path: Path) -> None:
    peer = Peer("port", "a port", f"{PORT}:dropped_scaling", "3.1-meta", "torch", "fp32")
    row = peers.run(peer, tmp_path, tmp_path, None)
    assert row.verdicts == {"fp32": "fail"} and row.rho is not None and row.rho["fp32"] > 2
    assert row.cause and row.version
