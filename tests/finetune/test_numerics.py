"""A packed row trains exactly like its documents one by one; accumulation, ranks and checkpointing change nothing."""

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from finetune import build as wrap
from finetune.build import Start, build_model, fresh_weights, wrap_
from finetune.config import TrainConfig, init_shape, resolve
from finetune.data.documents import Ints
from finetune.data.packing import Batch, Packer
from finetune.loss import IGNORE, LossModel
from finetune.optim import learning_rate, make_optimizer, mixed_seed, select_trained_, trained
from finetune.parallelize import World, open_world, replicate
from finetune.train import accumulate_
from nanollama.model import ModelConfig, Transformer

SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, hidden_dim=48, rope_theta=10_000.0)
CPU = World(torch.device("cpu"))
FP32 = torch.autocast("cpu", enabled=False)


class Random:
    """Documents of random tokens; token 1 is BOS."""

    bos_id = 1

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.lengths: Ints = np.array(lengths)
        self.texts = [np.append(1, generator.integers(2, SHAPE.vocab_size, n - 1)) for n in lengths]

    def tokens(self, document: int, start: int, stop: int) -> Ints:
        return self.texts[document][start:stop]


def make_model(*, peaked: float = 3.0, **changes: int) -> Transformer:
    shape = replace(SHAPE, **changes)
    weights = fresh_weights(shape, torch.Generator().manual_seed(0))
    # Sharper attention than at the start of a training shows a wrong mask better.
    return Transformer.from_weights(shape, {n: w * peaked if w.ndim > 1 else w for n, w in weights.items()})


def gradients(model: Transformer, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    count = sum(b.valid for b in batches)
    loss = float(accumulate_(LossModel(model), batches, count, FP32, CPU)) / count
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def assert_same(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=2e-6)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert rms(a[1][name] - b[1][name]) <= 1e-5 * rms(b[1][name]), name


# In a document of two tokens the judged one sees itself alone: the gradients of wq and wk are zero but for rounding.
LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=8).filter(lambda lengths: max(lengths) > 2)


@settings(max_examples=25)
@given(LENGTHS, st.integers(0, 100))
def test_packed_rows_equal_their_documents_one_by_one(lengths: list[int], seed: int) -> None:
    model, packer = make_model(), Packer(Random(lengths, seed), 30)
    packed = packer.batch(packer.in_order(len(lengths)))
    alone = [packer.batch([[i]]) for i in range(len(lengths))]
    with torch.no_grad():
        logits = model(packed.tokens, packed.positions, packed.doc_ids)
        for batch in alone:
            n = batch.valid + 1
            expected = model(batch.tokens[:, :n])[0]  # no mask, no positions: the document as a prompt
            row, place = find(packed.tokens, batch.tokens[0, :n])
            assert rms(logits[row, place : place + n] - expected) <= 2e-6 * rms(expected)
    assert_same(gradients(model, [packed]), gradients(model, alone))


def find(rows: Tensor, part: Tensor) -> tuple[int, int]:
    windows = rows.unfold(1, len(part), 1)  # (B, places, n)
    row, place = (windows == part).all(-1).nonzero()[0].tolist()
    return row, place


@pytest.mark.parametrize("attention", ["fast", "exact"])
def test_changing_one_document_leaves_the_others_bitwise_equal(attention: str) -> None:
    weights = make_model().state_dict()
    model = Transformer.from_weights(SHAPE, weights, attention=attention)
    packer = Packer(Random([9, 12, 7]), 30)
    batch = packer.batch([[0, 1, 2]])
    changed = batch.tokens.clone()
    changed[0, 10:21] = (changed[0, 10:21] + 7) % SHAPE.vocab_size
    assert batch.doc_ids is not None
    with torch.no_grad():
        before = model(batch.tokens, batch.positions, batch.doc_ids)[0]
        after = model(changed, batch.positions, batch.doc_ids)[0]
        unmasked = model(changed, batch.positions)[0] - model(batch.tokens, batch.positions)[0]
    others = batch.doc_ids[0] != 1
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])
    assert unmasked[21:28].abs().max() > 1e-3  # without the mask the third document sees the second


def test_accumulation_equals_one_batch_with_unequal_valid_tokens() -> None:
    packer = Packer(Random([30, 5, 20, 3, 11, 2]), 30)
    rows = [[0], [1], [2], [3], [4], [5]]
    whole = gradients(make_model(), [packer.batch(rows)])
    parts = gradients(make_model(), [packer.batch([row]) for row in rows])
    assert_same(parts, whole)
    uneven = gradients(make_model(), [packer.batch(rows[:4]), packer.batch(rows[4:])])
    assert_same(uneven, whole)


def test_the_mean_of_means_would_be_caught() -> None:
    packer = Packer(Random([30, 5, 20, 3]), 30)
    whole = gradients(make_model(), [packer.batch([[0], [1], [2], [3]])])
    wrong = [gradients(make_model(), [packer.batch([[i]])]) for i in range(4)]
    mean = {n: torch.stack([g[n] for _, g in wrong]).mean(0) for n in whole[1]}
    assert max(rms(mean[n] - whole[1][n]) / rms(whole[1][n]) for n in mean) > 0.1


def test_the_loss_agrees_with_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nanollama.checkpoint.names import hf_name, is_rotary, to_hf_rows

    model, packer = make_model(), Packer(Random([14, 14]), 14)
    batch = packer.batch([[0], [1]])
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        intermediate_size=SHAPE.hidden_dim,
        num_hidden_layers=SHAPE.n_layers,
        num_attention_heads=SHAPE.n_heads,
        num_key_value_heads=SHAPE.n_kv_heads,
        rms_norm_eps=SHAPE.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
    )
    theirs = LlamaForCausalLM(config)
    state = {hf_name(n): to_hf_rows(w, SHAPE.head_dim) if is_rotary(n) else w for n, w in model.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    loss = theirs(input_ids=batch.tokens, labels=batch.tokens).loss.item()
    assert gradients(model, [batch])[0] == pytest.approx(loss, rel=2e-6)


def rank_main(rank: int, port: int, out: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = open_world("cpu")
    packer = Packer(Random([30, 5, 20, 3, 11, 2]), 30)
    rows = [[0], [1], [2], [3], [4], [5]]
    batches = [packer.batch(rows[i : i + 1]) for i in range(rank, 6, 2)]
    model = make_model()
    count = float(world.sum([float(sum(b.valid for b in batches))]))
    nats = accumulate_(replicate(LossModel(model), world), batches, count, FP32, world)
    loss = float(world.sum(nats)) / count
    torch.save((loss, {n: p.grad for n, p in model.named_parameters()}), out / f"{rank}.pt")
    world.close()


def test_two_gloo_ranks_equal_one_process(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.run", "tests.finetune.test_numerics"])
    ranks = [context.Process(target=rank_main, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    packer = Packer(Random([30, 5, 20, 3, 11, 2]), 30)
    one = gradients(make_model(), [packer.batch([[0], [1], [2], [3], [4], [5]])])
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for result in results:
        assert_same(result, one)
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in one[1])


def config(**changes: object) -> TrainConfig:
    return resolve(TrainConfig(init="260K", **changes), "cpu", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dropout", "activation_checkpointing"), [(0.0, True), (0.3, False), (0.3, True)])
def test_checkpointed_blocks_repeat_their_dropout(dropout: float, activation_checkpointing: bool) -> None:
    packer = Packer(Random([30, 20]), 30)
    results = []
    for again in (False, activation_checkpointing):
        model = make_model()
        wrapped = wrap_(model, config(dropout=dropout, activation_checkpointing=again), CPU)
        torch.manual_seed(5)
        batch = packer.batch([[0], [1]])
        accumulate_(wrapped, [batch], batch.valid, FP32, CPU)
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-6, atol=0)


def test_dropout_acts_in_training_only_and_only_on_the_named_outputs() -> None:
    model = make_model()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        plain = model(tokens)
        wrap_(model, config(dropout=0.5), CPU)
        assert not torch.allclose(model(tokens), plain)
        assert torch.equal(model.eval()(tokens), plain)


def test_bf16_keeps_fp32_weights_and_its_loss_is_near() -> None:
    model, packer = make_model(), Packer(Random([30, 20]), 30)
    batch = packer.batch([[0], [1]])
    exact, _ = gradients(model, [batch])
    model.zero_grad()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    loss = float(accumulate_(LossModel(model), [batch], batch.valid, autocast, CPU)) / batch.valid
    assert loss != exact
    assert loss == pytest.approx(exact, rel=5e-3)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", lambda n: True),
        ("norms", lambda n: "norm" in n),
        ("no_embeddings", lambda n: n.startswith(("la", "no"))),
    ],
)
def test_each_method_trains_its_parameters_and_no_other(method: str, expected: object) -> None:
    model = make_model()
    select_trained_(model, method)
    assert set(trained(model)) == {n for n, _ in model.named_parameters() if expected(n)}  # type: ignore[operator]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, config())
    batch = Packer(Random([30]), 30).batch([[0]])
    accumulate_(LossModel(model), [batch], batch.valid, FP32, CPU)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained(model))


def test_weight_decay_reaches_matrices_and_not_norms() -> None:
    model = make_model()
    settings = config(lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(model, settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with no gradient, all that moves is what decays
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if parameter.ndim > 1 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_falls_to_its_end(schedule: str) -> None:
    settings = config(lr=2.0, min_lr=0.25, max_steps=50, warmup_steps=5, schedule=schedule)
    rates = [learning_rate(settings, step) for step in range(50)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_steps_ranks_and_seeds_get_different_random_numbers() -> None:
    seeds = {mixed_seed(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in (0, 1)}
    assert len(seeds) == 200
    # What the generator makes of them: torch's looks at the lower 32 bits alone.
    first = {float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(first) > 190


@pytest.mark.parametrize(("name", "parameters"), [("260K", 260_032), ("15M", 15_191_712), ("42M", 41_689_600)])
def test_presets_have_the_sizes_of_llama2c(name: str, parameters: int) -> None:
    settings = resolve(TrainConfig(init=name), "cpu", 1)
    with torch.device("meta"):
        model = Transformer(init_shape(settings, settings.vocab_size))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_fresh_weights_begin_near_the_uniform_loss() -> None:
    model = build_model(Start(), config(), 512, torch.device("cpu"))
    tokens = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORE)
    assert float(loss) == pytest.approx(math.log(512), rel=0.1)


def test_offloaded_blocks_hand_over_their_inputs_alone_and_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[tuple[int, ...]] = []

    def recorded(pin_memory: bool) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: handed.append(tuple(t.shape)) or t, lambda t: t)

    monkeypatch.setattr(wrap, "save_on_cpu", recorded)
    batch, found = Packer(Random([30, 20]), 30).batch([[0], [1]]), []
    for offload in (False, True):
        model = make_model()
        wrap.checkpoint_blocks_(model, offload=offload)
        found.append(gradients(model, [batch]))
    assert handed == [(2, 30, SHAPE.dim)] * SHAPE.n_layers
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], gradient) for name, gradient in found[1][1].items())
