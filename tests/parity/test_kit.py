"""The golden-state kit: the references pass by it, each of its gates can fail, and nothing damaged is a pass."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kit_cases
from kit_cases import Arrays, Made, check
from parity.checks.training import gradient_floor
from parity.kit import make as command
from parity.kit.arrays import Gate, Kit, KitWriter
from parity.kit.check import METRICS, Port, apply_gate
from parity.kit.gates import Floors, write_training
from parity.kit.gather import Source
from parity.measure.evidence import Kept, Pair, groups_of
from parity.measure.metrics import noise_rms, ratio
from parity.run.training import FILE, read


@pytest.fixture(scope="module")
def made() -> Made:
    return kit_cases.made()


@pytest.fixture(scope="module")
def rounded() -> Made:
    return kit_cases.rounded()


def failed(report: dict[str, Any]) -> set[str]:
    return {r["check"] for r in report["results"] if r["status"] != "pass" and r["status"] != "skip"}


def reference(source: Source, name: str, dtype: str, kit: Kit) -> Arrays:
    """What a reference computed, as a port writes it."""
    trace, port, found = source.evidence.references[name], Port(kit, Path(), dtype), Arrays()
    for tap in (t for t in source.evidence.measured(trace, dtype).taps):
        found[port.name(tap)] = torch.cat([trace.get(dtype, i, tap) for i in range(len(trace.sequences))])
    found |= {f"rope.{part}": table for part, table in trace.rope().items()}
    if dtype == "fp32":
        file = trace.folder / "training.safetensors"
        found |= {f"grad.{n}": g for n, g in read(file, "grad/").items()}
        found["train.losses"] = torch.tensor(trace.meta["training"]["losses"])
        found["train.loss"] = found["train.losses"][:1]
    return found


def adamw(kit: Kit, decay: Callable[[Tensor], float]) -> Arrays:
    """The made-up steps by torch's AdamW in float32."""
    hyper, found = kit.table["training"], Arrays()
    for name in [n.removeprefix("adamw.1.") for n in kit.arrays if n.startswith("adamw.1.")]:
        p = torch.nn.Parameter(kit.get(name))
        optimizer = torch.optim.AdamW([p], hyper["lr"], hyper["betas"], hyper["eps"], decay(p))
        for step in (1, 2):
            p.grad = kit.get(f"adamw.grad.{step}.{name}")
            optimizer.step()
            found[f"adamw.{step}.{name}"] = p.detach().clone()
    return found


@pytest.mark.parametrize("name", ["meta", "hf"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("which", ["made", "rounded"])
def test_the_references_pass(which: str, dtype: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source, folder = request.getfixturevalue(which)
    kit = Kit(folder)
    assert ("bf16.logits" in kit.arrays) == (which == "rounded")
    code, report = check(folder, reference(source, name, dtype, kit), tmp_path / "out", "--dtype", dtype)
    assert failed(report) == set()
    assert (code, report["verdict"]) == ((0, "pass") if dtype == "fp32" else (3, "limited"))
    checks = {r["check"] for r in report["results"] if r["status"] == "pass"}
    few = {"kl"} if which == "rounded" else set()
    assert {"taps", "logits", "kl", "argmax", "rope"} - few <= checks and ("training" in checks) == (dtype == "fp32")


def test_the_ratios_are_those_of_parity_check(made: Made, tmp_path: Path) -> None:
    (source, folder), dtype = made, "bf16"
    kit, ev = Kit(folder), source.evidence.be_lenient()
    port, arrays = Port(kit, tmp_path, dtype), reference(source, "hf", dtype, Kit(folder))
    theirs = ev.measured(ev.references["hf"], dtype)
    for tap, error in theirs.taps.items():
        judges = [ev.noise_floor(Pair(r, dtype, None)).taps[tap] for r in ("meta", "hf")]
        wanted = max(ratio(error.rms(i), noise_rms(judge, dtype, i)) for judge in judges for i in groups_of(error))
        gates = [g for g in port.gates[tap] if g.metric == "rms"]
        assert len(gates) == 2  # all sequences, and the long one alone
        found = [apply_gate(port, g, arrays[tap], kit.get(tap)).value for g in gates]
        assert max(x for x in found if x is not None) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("wrong", ["meta", "hf"])
def test_a_reference_that_is_wrong_widens_no_bound(wrong: str, made: Made) -> None:
    """Errors a thousand times as large as the other's: the other one's alone count."""
    ev = made[0].evidence
    right = "hf" if wrong == "meta" else "meta"
    found = {name: ev.measured(trace, "fp32") for name, trace in ev.references.items()}
    far = lambda e: replace(e, error=[1e6 * x for x in e.error], worst=[1e3 * x for x in e.worst])
    lost = replace(found[wrong], taps={tap: far(e) for tap, e in found[wrong].taps.items()})
    kept = Kept()
    kept.once(("measured", ev.references[wrong], "fp32"), lambda: lost)
    judges = Floors(replace(ev, floors=kept), "fp32")
    for tap in ("layers.0.q", "logits"):
        floor = noise_rms(found[right].taps[tap], "fp32")
        assert judges.smallest(lambda m, t=tap: noise_rms(m.taps[t], "fp32")) == pytest.approx(floor)
    margins = [rows.margin > 4 * worst for rows, worst in zip(ev.oracle_rows("fp32"), found[right].taps["logits"].worst,
                                                              strict=True)]  # fmt: skip
    assert judges.decided().tolist() == torch.cat(margins).int().tolist()
    assert not torch.equal(judges.decided(), Floors(judges.ev, "fp32").decided_by(wrong))


def test_training_is_judged_by_the_nearer_reference(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ev, kit = made[0].evidence, Kit(made[1])
    parties = {r.meta["implementation"]: r for r in ev.references.values()}
    assert len(parties) == 2
    floors = dict(zip(parties.values(), (3.0, 0.5), strict=True))
    monkeypatch.setattr("parity.kit.gates.loss_noise", lambda ev, reference: floors[reference])
    writer = KitWriter(tmp_path)
    write_training(ev, writer, {n: kit.get(n) for n, a in kit.arrays.items() if a.file == "weights.f32"})
    (loss,) = [g for g in writer.gates if g.array == "train.loss"]
    assert loss.noise == 0.5
    exact, differ = read(ev.oracle.folder / FILE, "grad/"), 0
    for gate in (g for g in writer.gates if g.label == "gradient"):
        name = gate.array.removeprefix("grad.")
        one, two = ([read(r.folder / FILE, kind)[name] for kind in ("grad/", "padded/")] for r in parties.values())
        assert gate.noise == min(gradient_floor(ways, exact[name]) for ways in ([one, two], [two, one]))
        differ += gradient_floor([one], exact[name]) != gradient_floor([two], exact[name])
    assert differ > 10


def off(gate: Gate, exact: Tensor, kit: Kit, size: float) -> Tensor:
    """The expected values moved to `size` times the gate's bound, in its rows alone."""
    mine, rows = exact.clone(), slice(gate.first, gate.first + gate.rows)
    part = mine[rows].reshape(-1)
    if gate.metric == "rms":
        signs = torch.randint(2, part.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        part += signs * gate.bound * size
    elif gate.metric == "tokens":
        best, decided = kit.get("best"), kit.get(f"decided.{gate.dtype}")
        row = int(decided.nonzero()[0] if size > 1 else (decided == 0).nonzero()[0])
        mine[row, (int(best[row]) + 1) % mine.shape[1]] = mine[row].max() + 1
        return mine
    else:
        at = int(part.abs().argmax()) if gate.metric == "relative" else part.numel() // 2
        scale = float(part[at].abs()) if gate.metric == "relative" else 1.0
        part[at] += gate.bound * size * scale
    mine[rows] = part.reshape(mine[rows].shape)
    return mine


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_gate_passes_below_its_bound_and_fails_above(made: Made, dtype: str, tmp_path: Path) -> None:
    kit = Kit(made[1])
    port, seen = Port(kit, tmp_path, dtype), set()
    for gate in (g for gates in port.gates.values() for g in gates if not g.metric.startswith("kl_")):
        exact = kit.get(gate.array)
        undecided = gate.metric != "tokens" or bool((kit.get(f"decided.{dtype}") == 0).any())
        verdicts = [apply_gate(port, gate, off(gate, exact, kit, size), exact).status.value for size in (0.98, 1.02) if
                    size > 1 or undecided]  # fmt: skip
        assert verdicts == ["pass", "fail"][-len(verdicts) :], gate
        seen.add((gate.check, gate.metric))
    training = {("training", "rms"), ("training", "max"), ("training", "relative")} if dtype == "fp32" else set()
    assert seen == {("taps", "rms"), ("logits", "rms"), ("argmax", "tokens"), ("rope", "max")} | training


@pytest.mark.parametrize("metric", ["kl_mean", "kl_p99", "kl_max"])
def test_kl_in_nats_is_held_against_its_bound(made: Made, metric: str, tmp_path: Path) -> None:
    kit, exact = Kit(made[1]), Kit(made[1]).get("logits")
    (gate,) = [g for g in kit.gates if g.metric == metric and g.dtype == "bf16"]
    port = Port(kit, tmp_path, "bf16")
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [exact + 10.0**-n * noise for n in range(-2, 5)]
    values = [METRICS[metric](port, mine, exact, slice(None)) for mine in steps]
    verdicts = [apply_gate(port, gate, mine, exact).status.value for mine in steps]
    assert verdicts == ["fail" if value > gate.bound else "pass" for value in values]
    assert set(verdicts) == {"pass", "fail"}


def test_a_port_with_every_array_passes(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit = Kit(made[1])
    arrays = reference(made[0], "meta", "fp32", kit) | adamw(kit, lambda p: 0.125 if p.ndim > 1 else 0.0)
    code, report = check(made[1], arrays, tmp_path / "out")
    assert code == 0 and report["schema"] == "nanollama.parity/1" and report["first_divergence"] is None
    assert {r["status"] for r in report["results"]} == {"pass"}
    assert set(arrays) == {n for n, a in kit.arrays.items() if a.file == "expected.f64"}
    text = capsys.readouterr().out
    assert "verdict      PASS" in text and "not covered" not in text


def only(name: str, change: Callable[[Tensor], Tensor]) -> tuple[str, Callable[[Kit, Arrays], Arrays]]:
    """A mistake in one array."""
    return name, lambda kit, right: {name: change(right[name])}


W1, W3 = (f"grad.layers.0.feed_forward.w{n}.weight" for n in (1, 3))
WRONG: dict[str, tuple[str, Callable[[Kit, Arrays], Arrays]]] = {
    "a gradient slightly off": only("grad.norm.weight", lambda g: g * 1.0001),
    "gradients exchanged": (W1, lambda kit, right: {W1: right[W3], W3: right[W1]}),
    "no weight decay": ("adamw.1.layers.0.attention.wk.weight", lambda kit, right: adamw(kit, lambda p: 0.0)),
    "norms decayed": ("adamw.1.layers.0.attention_norm.weight", lambda kit, right: adamw(kit, lambda p: 0.125)),
    "a sum for a mean": only("train.loss", lambda loss: loss * 38),
    "no step is taken": only("train.losses", lambda losses: losses[:1].expand(10)),
    "a table in bf16": only("rope.cos", Tensor.bfloat16),
    "rows of another sequence": only("layers.0.q_rope", lambda q: q.roll(7, 0)),
    "another tensor": ("layers.1.k", lambda kit, right: {"layers.1.k": right["layers.1.v"]}),
    "zeros": only("logits", torch.zeros_like),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_array_fails(mistake: str, made: Made, tmp_path: Path) -> None:
    name, change = WRONG[mistake]
    kit = Kit(made[1])
    right = reference(made[0], "meta", "fp32", kit)
    code, report = check(made[1], right | change(kit, right), tmp_path / "out")
    assert (code, report["verdict"]) == (1, "fail")
    assert any(name in r["where"] for r in report["results"] if r["status"] == "fail")
    if name in ("layers.0.q_rope", "layers.1.k", "logits"):
        assert report["first_divergence"]["tap"] == name


@pytest.mark.parametrize("name", ["embed", "layers.1.out", "logits", "rope.sin", "train.loss", "train.losses",
                                  "grad.output.weight", "adamw.2.norm.weight"])  # fmt: skip
@pytest.mark.parametrize("damage", ["nan", "inf", "short", "long", "empty"])
def test_what_is_no_number_or_of_another_size_fails(name: str, damage: str, made: Made, tmp_path: Path) -> None:
    exact = Kit(made[1]).get(name).float().flatten()
    if damage in ("nan", "inf"):
        exact[-1] = float(damage)
    sizes = {"short": exact[:-1], "long": torch.cat([exact, exact[:1]]), "empty": exact[:0]}
    code, report = check(
        made[1], {"logits": Kit(made[1]).get("logits"), name: sizes.get(damage, exact)}, tmp_path / "o"
    )
    assert (code, report["verdict"]) == (1, "fail")
    assert any(name in r["where"] for r in report["results"] if r["status"] == "fail")


def test_nothing_and_missing_logits_are_no_pass(made: Made, tmp_path: Path) -> None:
    code, report = check(made[1], {}, tmp_path / "nothing")
    assert (code, report["verdict"], report["why"]) == (3, "limited", "no tensor was compared")
    code, report = check(made[1], {"embed": Kit(made[1]).get("embed")}, tmp_path / "no-logits")
    assert (code, report["verdict"]) == (3, "limited") and "logits.f32 is missing" in report["why"]
    code, report = check(made[1], {"logits": Kit(made[1]).get("logits")}, tmp_path / "logits")
    assert (code, report["verdict"]) == (0, "pass")


def test_two_kits_are_equal_byte_for_byte(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "new" / "kit")]) == 0
    assert capsys.readouterr().out.startswith(f"kit          {tmp_path / 'new' / 'kit'}: 1")
    files = sorted(path.name for path in made[1].iterdir())
    assert files == sorted(path.name for path in (tmp_path / "new" / "kit").iterdir())
    assert all((made[1] / name).read_bytes() == (tmp_path / "new" / "kit" / name).read_bytes() for name in files)
    assert sum(path.stat().st_size for path in made[1].iterdir()) < 12e6


@pytest.mark.parametrize("which", ["made", "rounded"])
def test_the_text_says_what_the_json_says(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)[1]
    kit, lines = Kit(folder), (folder / "kit.txt").read_text().splitlines()
    words = [line.split() for line in lines[1:]]
    arrays = [(w[1], w[2], int(w[3]), tuple(map(int, w[5:]))) for w in words if w[0] == "array"]
    assert arrays == [(a.name, a.file, a.offset, a.shape) for a in kit.arrays.values()]
    assert all(len(a[3]) == int(w[4]) for a, w in zip(arrays, (w for w in words if w[0] == "array"), strict=True))
    bounds = [(*w[1:4], int(w[4]), int(w[5])) for w in words if w[0] == "bound"]
    assert bounds == [(g.dtype, g.array, g.metric, g.first, g.rows) for g in kit.gates]
    values = [float(w[6]) for w in words if w[0] == "bound"]
    assert values == pytest.approx([g.noise * g.factor for g in kit.gates], rel=1e-9)
    assert [int(w[2]) for w in words if w[0] == "sequence"] == kit.table["sequences"]
    config = {w[1]: float(w[2]) for w in words if w[0] == "config"}
    assert (config["norm_eps"], config["factor"], config["tied"]) == (2e-5, 8, 0)
    sizes = {file: sum(4 * (2 if file == "expected.f64" else 1) * prod(s) for _, f, _, s in arrays if f == file)
             for file in {a[1] for a in arrays}}  # fmt: skip
    assert sizes == {file: (folder / file).stat().st_size for file in sizes}


def test_the_kit_holds_the_stimulus(made: Made) -> None:
    """What mistakes need to show: scaled RoPE on a long sequence, grouped heads, decided tokens in 16 bits too."""
    table = Kit(made[1]).table
    assert max(table["sequences"]) >= 256 and all(n % 2 for n in table["sequences"])
    assert (
        table["config"]["rope_scaling"]["factor"] == 8
        and table["config"]["n_heads"] > table["config"]["n_kv_heads"] > 1
    )
    assert table["decided_fraction"]["fp32"] == 1.0 and 0.5 <= table["decided_fraction"]["bf16"] < 1.0
    assert 0.3 < table["float32_share"][0] < 1.0  # why expected.f64 is float64


def test_short_prompts_are_said_to_hide_errors(rounded: Made) -> None:
    assert any("the longest sequence has 5 tokens" in text for text in Kit(rounded[1]).table["notices"])
