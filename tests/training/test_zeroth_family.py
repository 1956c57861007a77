"""Rules beyond zeroth-order SGD, each against its definition by back-propagation or by perturbed copies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import PeftSection
from fedpeft.data.collate import collate
from fedpeft.data.encoded import Encoded, offsets_of
from fedpeft.errors import FederationError, ModelError, TrainingError
from fedpeft.ledger import RunFolder
from fedpeft.models.attach import attach
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.support import Support
from fedpeft.seedspace.supports import OneBlock, lowest_blocks, one_block, smallest_weights
from fedpeft.seedspace.trainable_tensors import trainable_parameters
from fedpeft.spaces import Route, Trail
from fedpeft.training.first_order import Rows
from fedpeft.training.losses import PRECISE_LOSSES
from fedpeft.training.zeroth_order import train
from fedpeft.training.zeroth_prober import Prober, prober
from tests.models.tiny import tiny_base
from tests.simulation.runs import fingerprint, simulated
from tests.spaces.test_seed_rounds import last, tables_of
from tests.training.test_zeroth_order import ROWS, SEED, at, loss_of, model_of, problems, section_of, signs

UNIT = 2.0**-24


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def slope_of(model: nn.Module, z: dict[str, torch.Tensor]) -> float:
    """Gradient times z, by back-propagation in float64."""
    model = model.double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in ROWS.indices.tolist():
        line = torch.from_numpy(ROWS.encoded.row(index).astype(np.int64))
        logits = model(input_ids=line[None]).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, line[1:], reduction="sum")
        count += len(line) - 1
    parameters = trainable_parameters(model)
    gradients = torch.autograd.grad(total / count, list(parameters.values()))
    return sum(float((g * z[name]).sum()) for name, g in zip(parameters, gradients, strict=True))


def trained(
    model: nn.Module,
    directions: list[int],
    support: Support | None = None,
    *,
    exponent: int | None = -24,
    **keys: object,
) -> Trail:
    section = section_of(**keys)
    probe = prober(model, CounterStream(SEED, support=support))
    route = Route(np.array(directions, dtype=np.int64), exponent, 2**30)
    steps = len(directions) // section.queries
    return train(probe, ROWS, section, route, steps=steps, rng=np.random.default_rng(0))[1]


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


@pytest.mark.parametrize("method", ["full", "lora", "ia3", "prefix", "ln-tuning"])
def test_forward_gradients_are_directional_derivatives(method: str) -> None:
    directions = [5, 6, 7]
    queries = len(directions)
    found = trained(model_of(method), directions, rule="forward-grad", queries=queries, lr=1.0).amounts
    for direction, amount in zip(directions, found, strict=True):
        model = model_of(method)
        slope = slope_of(model, signs(model, direction))
        assert amount == pytest.approx(-slope / queries / UNIT, rel=1e-4, abs=5)
    assert max(abs(found)) > 50_000  # the tolerance means something


@pytest.mark.parametrize("kind", ["bert", "llama-classifier"])
def test_forward_gradients_of_classifiers(kind: str) -> None:
    section = PeftSection.model_validate({"method": "lora"})
    model = attach(tiny_base(kind), section, task="sequence-classification", seed=0)
    ids = np.random.default_rng(0).integers(1, 96, 20).astype(np.int32)
    encoded = Encoded(ids, offsets_of([9, 11]), np.zeros(2, dtype=np.int32), np.array([0, 2]), None)
    rows = Rows(encoded, np.arange(2), "sequence-classification", 0)
    batch = collate(encoded, rows.indices, 0, task=rows.task)
    probe = prober(model, CounterStream(SEED))
    loss, slope = probe.tangent([batch], rows, 3)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = nn.functional.cross_entropy(logits, batch.labels)
    gradients = torch.autograd.grad(expected, list(probe.parameters.values()))
    z = signs(model, 3)
    parts = zip(probe.parameters, gradients, strict=True)
    assert slope == pytest.approx(sum(float((g * z[name]).sum()) for name, g in parts), rel=1e-4)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_differences_approach_the_forward_gradient() -> None:
    exact = int(trained(model_of(), [5], rule="forward-grad").amounts[0])
    errors = [abs(int(trained(model_of(), [5], radius=r).amounts[0]) - exact) for r in (3e-2, 3e-3)]
    assert errors[1] < errors[0] / 10  # the error goes with the square of the radius


def test_forward_gradients_leave_nothing_behind() -> None:
    model = model_of()
    before = copies(model)
    trained(model, [5], rule="forward-grad", lr=1e-30, exponent=None)
    assert all(torch.allclose(t, before[name], rtol=0, atol=1e-29) for name, t in copies(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_block_wise_steps_move_the_chosen_layer_only() -> None:
    model = model_of()
    support = one_block(model, SEED)
    assert support.count == 4  # embedding, two layers, last norm
    chosen = support.choose_blocks(torch.arange(12)).tolist()
    for block in range(4):
        direction = chosen.index(block)
        other = model_of()
        z = signs(other, direction)
        ids = {name: number for number, name in enumerate(sorted(z))}
        z = {name: part * (support.blocks[ids[name]] == block) for name, part in z.items()}
        slope = (at(other, z, 1e-3) - at(other, z, -1e-3)) / 2e-3
        before = copies(other)
        amounts = trained(other, [direction], OneBlock(SEED, support.blocks, 4), rule="block-wise").amounts
        assert amounts[0] == pytest.approx(-1e-3 * slope / UNIT, rel=5e-3, abs=20)
        for name, tensor in copies(other).items():
            assert torch.equal(tensor, before[name] + float(amounts[0]) * UNIT * z[name])
            assert torch.equal(tensor, before[name]) == (support.blocks[ids[name]] != block)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_sparse_steps_leave_the_bits_of_masked_weights(method: str) -> None:
    model = model_of(method)
    support = smallest_weights(model, 0.25)
    before = copies(model)
    amounts = trained(model, [1, 2, 3, 4], support, rule="sparse", lr=1e-2).amounts
    assert amounts.all()
    z = [signs(model, direction) for direction in (1, 2, 3, 4)]
    for number, (name, tensor) in enumerate(sorted(copies(model).items())):
        mask = support.mask(number).view(tensor.shape)
        flat = before[name].abs().flatten()
        assert int(mask.sum()) == max(1, math.floor(0.25 * mask.numel()))
        assert float(flat[mask.flatten()].max()) <= float(flat[~mask.flatten()].min())
        kept, old = tensor[~mask].view(torch.int32), before[name][~mask].view(torch.int32)
        assert torch.equal(kept, old)
        moved = sum(float(a) * UNIT * part[name] for part, a in zip(z, amounts, strict=True))
        assert torch.allclose(tensor[mask], (before[name] + moved)[mask], atol=1e-6)
        assert not torch.equal(tensor[mask], before[name][mask])


def test_the_slope_of_a_sparse_step_is_along_the_masked_direction() -> None:
    model = model_of()
    support = smallest_weights(model, 0.1)
    z = {
        name: part * support.mask(n).view(part.shape)
        for n, (name, part) in enumerate(signs(model, 5).items())
    }
    slope = (at(model, z, 1e-3) - at(model, z, -1e-3)) / 2e-3
    amounts = trained(model, [5], support, rule="sparse").amounts
    assert amounts[0] == pytest.approx(-1e-3 * slope / UNIT, rel=5e-3, abs=20)


def test_a_hybrid_step_is_zeroth_order_below_and_a_gradient_step_above() -> None:
    model, oracle = model_of(), model_of()
    support = lowest_blocks(model, 1)
    names = sorted(trainable_parameters(oracle))
    below = {name for number, name in enumerate(names) if number in support.ids}
    assert below
    assert below != set(names)
    z = {name: part * (name in below) for name, part in signs(oracle, 5).items()}
    slope = (at(oracle, z, 1e-3) - at(oracle, z, -1e-3)) / 2e-3
    before = copies(oracle)
    keys = {"rule": "hybrid", "layers_below": 1, "optimizer": "sgd", "lr": 1e-3, "lr_above": 0.5}
    trail = trained(model, [5], support, exponent=None, **keys)
    assert not trail.amounts.any()
    gradients = torch.autograd.grad(_mean_loss(oracle), list(trainable_parameters(oracle).values()))
    for (name, tensor), gradient in zip(trainable_parameters(oracle).items(), gradients, strict=True):
        moved = -1e-3 * slope * z[name] if name in below else -0.5 * gradient
        found = trainable_parameters(model)[name].detach()
        assert torch.allclose(found, before[name] + moved, atol=2e-6), name
        assert float((found - before[name]).abs().max()) > 1e-5
        assert tensor.grad is None
        assert trainable_parameters(model)[name].grad is None


def test_the_lower_part_of_a_hybrid_step_keeps_no_graph() -> None:
    model = model_of()
    support = lowest_blocks(model, 1)
    seen: list[bool] = []
    first = model.get_submodule("base_model.model.model.layers.0")
    hook = first.register_forward_hook(
        lambda module, inputs, output: seen.append(_first(output).requires_grad)
    )
    trained(model, [5], support, exponent=None, rule="hybrid", layers_below=1, optimizer="sgd")
    hook.remove()
    assert seen == [False, False, False]  # two nearby losses, one pass with gradients


def _first(output: object) -> torch.Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, torch.Tensor)
    return found


def test_a_hybrid_without_upper_layers_is_refused() -> None:
    with pytest.raises(TrainingError, match="layers_below"):
        trained(model_of(), [5], None, exponent=None, rule="hybrid", layers_below=9)


def test_more_queries_are_closer_to_the_gradient() -> None:
    """The mean over Q directions: the error of the estimate falls with the root of Q."""
    model = model_of("ln-tuning")
    parameters = trainable_parameters(model)
    gradients = torch.cat(
        [g.flatten() for g in torch.autograd.grad(_mean_loss(model), list(parameters.values()))]
    )
    errors = []
    for queries in (4, 64):
        other = model_of("ln-tuning")
        before = copies(other)
        trained(other, list(range(queries)), rule="zo-sgd", queries=queries, lr=1.0)
        moved = torch.cat(
            [(t - before[n]).flatten() for n, t in trainable_parameters(other).items()]
        ).detach()
        errors.append(float((moved + gradients).norm() / gradients.norm()))
    # With signs the expected square is (d - 1) / Q; 16 times the directions, a quarter of the error.
    dimension = len(gradients)
    assert errors[0] == pytest.approx(math.sqrt((dimension - 1) / 4), rel=0.35)
    assert errors[1] == pytest.approx(math.sqrt((dimension - 1) / 64), rel=0.2)


def _mean_loss(model: nn.Module) -> torch.Tensor:
    lines = [torch.from_numpy(ROWS.encoded.row(i).astype(np.int64)) for i in range(4)]
    losses = [
        nn.functional.cross_entropy(model(input_ids=line[None]).logits[0, :-1], line[1:], reduction="sum")
        for line in lines
    ]
    return torch.stack(losses).sum() / sum(len(line) - 1 for line in lines)


def test_evaluate_reads_each_batch_where_it_is_asked() -> None:
    """What a trainer that clips per example builds on."""
    model = model_of("ln-tuning")
    probe: Prober = prober(model, CounterStream(SEED))
    batches = [collate(ROWS.encoded, np.array(part), 0, task=ROWS.task) for part in ([0, 1], [2, 3])]
    parts = probe.evaluate(batches, PRECISE_LOSSES["causal-lm"], 5, 1e-2)
    assert sum(parts) / 23 == pytest.approx(at(model, signs(model, 5), 1e-2), rel=1e-5)
    assert len(parts) == 2
    assert sum(probe.evaluate(batches, PRECISE_LOSSES["causal-lm"])) / 23 == pytest.approx(
        loss_of(model), rel=1e-5
    )


@pytest.mark.parametrize("rule", ["sparse", "block-wise", "forward-grad"])
def test_rounds_replay_to_the_bits_that_the_server_holds(rule: str, tmp_path: Path) -> None:
    tables = tables_of(tmp_path)
    tables["training"] |= {"rule": rule}
    simulated(tables, tmp_path / "run")
    simulated(tables, tmp_path / "two", workers=2)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "two")
    run = build_run(tables, source="test")
    veteran = load_simulated_run(run)
    before = copies(veteran.model)
    checkpoint = last(tmp_path / "run")
    veteran.space.enter(veteran.parameters, checkpoint.state)  # refuses other weights than the server's
    assert checkpoint.state["amounts"].any()
    support = None if veteran.directions is None else veteran.directions.support
    for number, (name, parameter) in enumerate(sorted(veteran.parameters.items())):
        mask = None if support is None else support.mask(number)
        if mask is not None:
            still = ~mask.view(parameter.shape)
            assert torch.equal(parameter.detach()[still], before[name][still])
            assert not torch.equal(parameter.detach()[~still], before[name][~still])


def test_the_mask_is_part_of_what_is_frozen(tmp_path: Path) -> None:
    tables = tables_of(tmp_path)
    digests = {}
    for density in (0.25, 0.5):
        tables["training"] |= {"rule": "sparse", "density": density}
        digests[density] = load_simulated_run(build_run(tables, source="test")).base_digest
    tables["training"] = {"kind": "zeroth-order", "steps": 4}
    digests[1] = load_simulated_run(build_run(tables, source="test")).base_digest
    assert len(set(digests.values())) == 3


def test_an_agent_with_another_mask_is_refused(tmp_path: Path) -> None:
    """Its state's fingerprint is the same at the start, and after a round it is not."""
    tables = tables_of(tmp_path)
    tables["training"] |= {"rule": "sparse"}
    simulated(tables, tmp_path / "run")
    tables["training"] |= {"density": 0.5}
    other = load_simulated_run(build_run(tables, source="test"))
    with pytest.raises(ModelError, match="fingerprint"):
        other.space.enter(other.parameters, last(tmp_path / "run").state)


def test_hybrid_runs_in_the_plain_space(tmp_path: Path) -> None:
    tables = tables_of(tmp_path)
    tables["space"] = {"kind": "adapter-delta"}
    tables["training"] |= {"rule": "hybrid", "layers_below": 2, "optimizer": "sgd"}
    simulated(tables, tmp_path / "run")
    with RunFolder.resume(tmp_path / "run") as folder:
        assert folder.read_end() is not None


def test_a_model_for_evaluation_is_not_trained(tmp_path: Path) -> None:
    resident = load_simulated_run(build_run(tables_of(tmp_path), source="test"))
    resident.directions = None
    with pytest.raises(FederationError, match="evaluation only"):
        _ = resident.prober


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"training": {"rule": "hybrid", "layers_below": 2}}, "gradients, which are dense"),
        ({"training": {"rule": "hybrid"}, "space": {"kind": "adapter-delta"}}, "layers from the bottom"),
        ({"training": {"rule": "momentum"}}, "use space 'adapter-delta' or one of block-wise, conservative"),
        ({"training": {"density": 0.5}}, "only rule 'sparse'"),
        ({"training": {"lr_above": 0.5}}, "only rule 'hybrid'"),
        ({"training": {"rule": "forward-grad", "radius": 0.1}}, "taken at a point"),
        (
            {"training": {"rule": "forward-grad"}, "model": {"quantization": "nf4"}},
            "no forward-mode derivative",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(
    tables: dict[str, dict[str, object]], reason: str
) -> None:
    assert reason in problems(**tables)


@pytest.mark.parametrize("rule", ["forward-grad", "block-wise", "sparse", "sign", "conservative"])
def test_rules_that_replay_are_taken_in_seed_space(rule: str) -> None:
    assert problems(training={"rule": rule}) == ""


def test_a_hybrid_may_have_an_optimiser() -> None:
    training = {
        "rule": "hybrid",
        "layers_below": 2,
        "optimizer": "sgd",
        "momentum": 0.9,
        "max_grad_norm": 1.0,
    }
    assert problems(training=training, space={"kind": "adapter-delta"}) == ""
