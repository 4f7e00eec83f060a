"""Candidates asked through the protocol of `cmd:`: programs, and Python files in an environment of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from mutant_evidence import base, judge
from parity.candidates.command import command_loader
from parity.candidates.crash import Crashed, Wrong
from parity.candidates.environment import environment_loader, within
from parity.check import main
from parity.contract import UsageError
from parity.mutants import evaluate as mutants
from ports import plain_port

PORTS = Path(plain_port.__file__).parent
IDS = torch.tensor([[3, 1, 2]])
PLAIN = """
import os
print("a library's greeting")
os.write(1, b"and one from C\\n")

class Model:
    max_positions = 40
    dtypes = {"fp32", "bf16"}
    last = 0.5

    def __call__(self, tokens):
        rows = [list(row) for row in tokens]
        return [[[float(t), 0.25, self.last] for t in row] for row in rows]

    def encode(self, text):
        return [1, *map(ord, text)]

    def encode_chat(self, dialog):
        return None

    def rope(self, x, cos, sin):
        return x

    def taps(self, tokens):
        raise ValueError("no kernel\\nfor this")

    def prefill(self, tokens):
        raise NotImplementedError("no cache")

    def decode(self, tokens):
        return [[7, 8, 9]]

    def ops(self, name, inputs):
        return inputs

    def loss_and_grads(self, tokens, targets):
        return 1 / 3, {"norm.weight": [float(t) for row in targets for t in row]}

    def packed(self, tokens, doc_ids):
        return [[[float(t), float(d), 0.0] for t, d in zip(tokens[0], doc_ids[0])]]

    def config(self):
        return {"dim": 64, "rope_scaling": None}

def load(checkpoint, dtype, device):
    import sys
    sys.stdin.read()  # nobody types here
    assert dtype in ("fp32", "bf16") and "torch" not in sys.modules and "numpy" not in sys.modules, dtype
    return Model()

def breaks(checkpoint, dtype, device):
    raise FileNotFoundError("weights.bin")

def leaves(checkpoint, dtype, device):
    os._exit(5)

def declines(checkpoint, dtype, device):
    raise NotImplementedError("nothing in " + dtype)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.checkpoint(tmp_path_factory.mktemp("ckpt") / "meta", vocab_size=64, n_layers=1))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has its standard library alone, and a candidate written for it: "PYTHON FILE"."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (folder / "contract.py").write_text("greeting = 'mine'\n")
    (folder / "bare_port.py").write_text(f"import contract; assert contract.greeting == 'mine'\n{PLAIN}")
    return f"{folder / 'venv/bin/python'} {folder / 'bare_port.py'}"


def test_a_python_without_torch_and_numpy_is_enough(bare: str, checkpoint: str) -> None:
    model = environment_loader(f"{bare}:load")(checkpoint, torch.float32, "cpu")
    expected = [[float(t), 0.25, 0.5] for t in IDS[0]]
    assert model(IDS).tolist() == [expected]
    assert model(torch.cat([IDS, IDS + 1]))[1].tolist() == [[float(t) + 1, 0.25, 0.5] for t in IDS[0]]
    assert model.encode("a\nb") == [1, 97, 10, 98] and model.encode_chat([{"role": "user", "content": "é"}]) is None  # type: ignore[attr-defined]
    assert model.max_positions == 40 and sorted(model.dtypes) == ["bf16", "fp32"]  # type: ignore[attr-defined]


def test_gradients_packed_rows_and_the_config_come_across(bare: str, checkpoint: str) -> None:
    model = environment_loader(f"{bare}:load")(checkpoint, torch.float32, "cpu")
    rows = torch.arange(128).view(8, 16)
    loss, grads = model.loss_and_grads(rows * 0, rows)  # type: ignore[attr-defined]
    assert loss == 1 / 3 and torch.equal(grads["norm.weight"], rows.flatten().float())
    with pytest.raises(RuntimeError, match=r"holds 12 bytes: expected \(128\) of float32"):
        model.loss_and_grads(IDS, IDS)  # type: ignore[attr-defined]
    assert model.packed(IDS, IDS - 1)[0, :, 1].tolist() == [2.0, 0.0, 1.0]  # type: ignore[attr-defined]
    assert model.config() == {"dim": 64, "rope_scaling": None}  # type: ignore[attr-defined]


def test_what_is_ignored_or_not_asked_there_is_noted(bare: str, checkpoint: str) -> None:
    model = environment_loader(f"{bare}:load")(checkpoint, torch.float32, "cpu")
    first, second = model.notices  # type: ignore[attr-defined]
    assert first == "the candidate's rope is ignored: it takes (x, cos, sin), the interface has rope(positions)"
    assert second == "ops: not asked of a candidate in an environment of its own"
    assert not hasattr(model, "rope") and not hasattr(model, "ops")


def test_what_goes_wrong_there_is_told_as_here(bare: str, checkpoint: str) -> None:
    model = environment_loader(f"{bare}:load")(checkpoint, torch.float32, "cpu")
    with pytest.raises(Crashed) as caught:
        model.taps(IDS)  # type: ignore[attr-defined]
    assert (caught.value.reason, caught.value.where) == ("taps(tokens) raised ValueError: no kernel", "bare_port.py:26")
    with pytest.raises(NotImplementedError, match=r"^no cache$"):
        model.prefill(IDS)  # type: ignore[attr-defined]
    with pytest.raises(Wrong, match=re.escape("decode(tokens) returned an int: expected floating-point numbers")):
        model.decode(IDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("attribute", "error", "said"),
    [
        ("breaks", Crashed, "load(checkpoint, fp32, cpu) raised FileNotFoundError: weights.bin"),
        ("leaves", Crashed, "load(checkpoint, fp32, cpu) ended the process with exit code 5"),
        ("declines", NotImplementedError, "nothing in fp32"),
        ("laod", UsageError, "has no callable 'laod'; did you mean load?"),
    ],
)
def test_a_load_that_fails_there_says_so(
    attribute: str, error: type[Exception], said: str, bare: str, checkpoint: str
) -> None:
    with pytest.raises(error, match=re.escape(said)):
        environment_loader(f"{bare}:{attribute}")(checkpoint, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("python", "candidate", "said"),
    [
        ("no/python", "my_port.py:load", "there is no Python 'no/python'"),
        (sys.executable, "my_port.py:load", "candidate file my_port.py does not exist"),
        (sys.executable, "nanollama", "--candidate_python runs module:attr or file.py:attr, not 'nanollama'"),
        (sys.executable, "cmd:sh", "--candidate_python runs module:attr"),
    ],
)
def test_what_is_not_there_is_refused_before_any_work(
    python: str, candidate: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--candidate", candidate, "--candidate_python", python]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def in_this_environment(attribute: str) -> str:
    return within(sys.executable, f"{PORTS / 'plain_port.py'}:{attribute}").removeprefix("env:")


def test_a_right_port_passes_from_another_environment() -> None:
    _, results = judge("gqa", environment_loader(in_this_environment("load")))
    assert not mutants.failed(results)
    assert {r.status.value for r in results if r.check == "taps"} == {"pass"}


def test_a_wrong_port_fails_from_another_environment_where_it_is_wrong() -> None:
    row = mutants.row_of(*judge("gqa", environment_loader(in_this_environment("wrong_base"))))
    assert (row.killed_by, row.found) == ("taps", "layers.0.q_rope")


# --- Programs that answer more than logits ---------------------------------------------------------------------------


def wide(spoilt: str = "") -> str:
    return f"{sys.executable} {PORTS / 'wide_program.py'} {{ckpt}} {{dtype}} {{answers}} {spoilt}"


def test_a_program_answers_batches_a_cache_and_texts_beside_what_it_prints(checkpoint: str) -> None:
    program = command_loader(wide())(checkpoint, torch.float32, "cpu")
    alone = plain_port.load(checkpoint, torch.float32, "cpu")
    both = torch.cat([IDS, IDS + 1])
    # Two processes may share out a product among other numbers of threads, so bits are not asked for.
    torch.testing.assert_close(program(both), alone(both))
    first, second = program.prefill(IDS), program.decode(IDS[:, :1])  # type: ignore[attr-defined]
    torch.testing.assert_close(first, alone(IDS))
    torch.testing.assert_close(second, alone(torch.cat([IDS, IDS[:, :1]], 1))[:, -1:])
    assert program.encode("a b\n") == [1, 97, 32, 98, 10]  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match=r"^hello there$"):
        program.encode_chat([{"role": "user", "content": "hello there"}])  # type: ignore[attr-defined]
    assert (program.max_positions, program.notices) == (300, ["a remark"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spoilt", "check"), [("", None), ("decode", "cache"), ("batch", "metamorphic")])
def test_a_programs_cache_and_batches_are_judged(spoilt: str, check: str | None) -> None:
    _, results = judge("gqa", command_loader(wide(spoilt)))
    assert {r.check for r in mutants.failed(results)} - {"greedy"} == ({check} if check else set())
    assert {r.status.value for r in results if r.check == "cache"} == {"fail" if check == "cache" else "pass"}


def test_a_program_that_declares_what_is_unknown_is_refused(checkpoint: str, tmp_path: Path) -> None:
    program = tmp_path / "liar.sh"
    program.write_text('read a; echo ok logits declare; read a; echo \'ok {"integer": "int8"}\'\n')
    with pytest.raises(UsageError, match="declares 'integer': expected dtypes, integers"):
        command_loader(f"sh {program}")(checkpoint, torch.float32, "cpu")


def test_the_evidence_has_batches_and_a_cache_to_judge() -> None:
    assert len(base("gqa").case.prompts or []) > 1
