"""The zeroth-order trainer against perturbed copies of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import PeftSection, TrainingSection
from fedpeft.data.encoded import Encoded, offsets_of
from fedpeft.errors import TrainingError
from fedpeft.models.attach import attach
from fedpeft.planning.preflight import problems_of
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.trainable_tensors import trainable_parameters
from fedpeft.spaces import Route, Trail
from fedpeft.training.first_order import Rows, TrainingReport
from fedpeft.training.zeroth_order import train
from fedpeft.training.zeroth_prober import Prober, prober
from fedpeft.training.zeroth_rules import RULES
from tests.models.tiny import tiny_base
from tests.spaces.oracles import sign

SEED = 11


def rows_of(lengths: list[int]) -> Rows:
    rng = np.random.default_rng(3)
    ids = rng.integers(1, 96, sum(lengths)).astype(np.int32)
    starts = np.ones(len(lengths), dtype=np.int32)
    encoded = Encoded(ids, offsets_of(lengths), starts, None, None)
    return Rows(encoded, np.arange(len(lengths), dtype=np.int64), "causal-lm", 0)


ROWS = rows_of([5, 9, 7, 6])


def model_of(method: str = "full", **options: Any) -> nn.Module:
    section = PeftSection.model_validate({"method": method, **options})
    return attach(tiny_base("llama"), section, task="causal-lm", seed=0)


def section_of(**keys: Any) -> TrainingSection:
    return TrainingSection.model_validate({"kind": "zeroth-order", "lr": 1e-3, "batch_size": 4, **keys})


def signs(model: nn.Module, direction: int) -> dict[str, torch.Tensor]:
    result = {}
    for number, (name, parameter) in enumerate(sorted(trainable_parameters(model).items())):
        row = [sign(SEED, number, direction, place) for place in range(parameter.numel())]
        result[name] = torch.tensor(row, dtype=torch.float32).view(parameter.shape)
    return result


def loss_of(model: nn.Module, rows: Rows = ROWS) -> float:
    """Mean over all scored tokens, one row at a time, in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for index in rows.indices.tolist():
            line = torch.from_numpy(rows.encoded.row(index).astype(np.int64))
            logits = model(input_ids=line[None]).logits[0, :-1].double()
            total += float(nn.functional.cross_entropy(logits, line[1:], reduction="sum"))
            count += len(line) - 1
    return total / count


def at(model: nn.Module, z: dict[str, torch.Tensor], scale: float) -> float:
    """The loss of weights that are moved in place and put back from a copy."""
    parameters = trainable_parameters(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(z[name], alpha=scale)
        loss = loss_of(model)
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    return loss


def trained(
    model: nn.Module,
    section: TrainingSection,
    directions: list[int],
    *,
    exponent: int | None = -24,
    **keys: Any,
) -> tuple[Prober, TrainingReport, Trail]:
    probe = prober(model, CounterStream(SEED))
    route = Route(np.array(directions, dtype=np.int64), exponent, keys.get("largest", 2**24))
    steps = len(directions) // section.queries
    report, trail = train(
        probe, keys.get("rows", ROWS), section, route, steps=steps, rng=np.random.default_rng(0)
    )
    return probe, report, trail


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_scalar_is_the_slope_along_the_direction() -> None:
    model, section = model_of("ln-tuning"), section_of(radius=1e-3)
    z = signs(model, 5)
    above, below = at(model, z, 1e-3), at(model, z, -1e-3)
    _, report, trail = trained(model, section, [5])
    expected = -1e-3 * (above - below) / 2e-3 * 2**24
    assert trail.amounts[0] == pytest.approx(expected, rel=2e-3)
    assert abs(trail.amounts[0]) > 100  # the tolerance means something
    assert report.loss == pytest.approx((above + below) / 2, rel=1e-5)
    assert (report.steps, report.examples) == (1, 4)


def test_the_trajectory_uses_the_rounded_scalar() -> None:
    model, section = model_of("ln-tuning"), section_of()
    start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    _, _, trail = trained(model, section, [3], exponent=-12)  # coarse: rounding shows
    z = signs(model, 3)
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, start[name] + float(trail.amounts[0]) * 2.0**-12 * z[name])


def test_a_second_step_starts_where_the_first_ended() -> None:
    model, section = model_of("ln-tuning"), section_of(lr=3e-2)
    _, _, both = trained(model, section, [3, 8], rows=rows_of([6]))
    other = model_of("ln-tuning")
    probe, _, first = trained(other, section, [3], rows=rows_of([6]))
    route = Route(np.array([8], dtype=np.int64), -24, 2**24)
    _, second = train(probe, rows_of([6]), section, route, steps=1, rng=np.random.default_rng(0))
    assert both.amounts.tolist() == [*first.amounts.tolist(), *second.amounts.tolist()]


def test_queries_are_measured_at_one_point_and_averaged() -> None:
    alone = [int(trained(model_of("ln-tuning"), section_of(), [k])[2].amounts[0]) for k in (4, 9)]
    _, _, trail = trained(model_of("ln-tuning"), section_of(queries=2), [4, 9])
    assert trail.amounts.tolist() == pytest.approx([alone[0] / 2, alone[1] / 2], abs=1)


def test_micro_batches_make_one_batch() -> None:
    whole = trained(model_of("ln-tuning"), section_of(batch_size=4), [2])[2]
    parts = trained(model_of("ln-tuning"), section_of(batch_size=2, gradient_accumulation=2), [2])[2]
    assert parts.amounts[0] == pytest.approx(float(whole.amounts[0]), rel=1e-3)


def test_sign_moves_by_the_learning_rate() -> None:
    scalar = trained(model_of("ln-tuning"), section_of(), [5])[2].amounts[0]
    moved = trained(model_of("ln-tuning"), section_of(rule="sign"), [5])[2].amounts[0]
    assert moved == np.sign(scalar) * round(1e-3 * 2**24)


@pytest.mark.parametrize(("lr", "wanted"), [(1e-3, "move"), (1.0, "not")])
def test_conservative_takes_the_best_of_three(lr: float, wanted: str) -> None:
    model = model_of("full")
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    plain = int(trained(model_of("full"), section_of(lr=lr), [5], exponent=-16)[2].amounts[0])
    z = signs(model, 5)
    losses = {share: at(model, z, share * plain * 2.0**-16) for share in (1, 0, -1)}
    best = min(losses, key=lambda share: losses[share])
    assert (best == 1) == (wanted == "move")
    _, _, trail = trained(model, section_of(lr=lr, rule="conservative"), [5], exponent=-16)
    assert trail.amounts[0] == best * plain
    if best == 0:
        assert all(
            torch.equal(parameter, before[name]) for name, parameter in trainable_parameters(model).items()
        )


def test_max_scalar_cuts() -> None:
    moved = trained(model_of("ln-tuning"), section_of(max_scalar=0.01), [5])[2].amounts[0]
    assert abs(moved) == round(1e-3 * 0.01 * 2**24)


def test_dense_rules_are_torch_optimisers_on_the_estimate() -> None:
    model, section = model_of("ln-tuning"), section_of(rule="momentum", lr=0.1)
    oracle = model_of("ln-tuning")
    parameters = trainable_parameters(oracle)
    speed = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for direction in (4, 6):
        z = signs(oracle, direction)
        slope = (at(oracle, z, 1e-3) - at(oracle, z, -1e-3)) / 2e-3
        with torch.no_grad():
            for name, parameter in parameters.items():
                speed[name] = 0.9 * speed[name] + slope * z[name]
                parameter.sub_(speed[name], alpha=0.1)
    _, _, trail = trained(model, section, [4, 6], exponent=None)
    assert not trail.amounts.any()
    for name, parameter in trainable_parameters(model).items():
        assert torch.allclose(parameter, parameters[name], atol=2e-4)
        assert not torch.allclose(parameter, trainable_parameters(model_of("ln-tuning"))[name], atol=2e-3)
        assert parameter.grad is None


@pytest.mark.parametrize("method", ["lora", "ia3", "full", "prefix"])
def test_every_trainable_set_is_moved_and_nothing_else(method: str) -> None:
    model = model_of(method)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    _, _, trail = trained(model, section_of(lr=1e-2), [1, 2])
    assert trail.amounts.any()
    assert all(not torch.equal(p, start[name]) for name, p in trainable_parameters(model).items())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_dropout_is_off() -> None:
    runs = [trained(model_of("lora", lora_dropout=0.5), section_of(), [1])[2].amounts[0] for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = model_of("ln-tuning")
    with torch.no_grad():
        next(iter(trainable_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"nan.*training\.lr"):
        trained(model, section_of(), [1])


def test_a_step_beyond_the_agreed_range_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"agreed range.*max_scalar"):
        trained(model_of("ln-tuning"), section_of(), [5], largest=3)


def problems(**tables: Any) -> str:
    base: dict[str, Any] = {
        "run": {"name": "zeroth", "rounds": 1},
        "training": {"kind": "zeroth-order", "steps": 4, **tables.pop("training", {})},
        "space": {"kind": "seed-scalars", **tables.pop("space", {})},
    }
    return "\n".join(problems_of(build_run({**base, **tables}, source="test")))


def test_a_sound_run_has_no_problem() -> None:
    assert problems() == ""
    assert problems(space={"kind": "adapter-delta"}, training={"rule": "adam"}) == ""
    assert problems(space={"mode": "common", "num_seeds": 4}, federation={"strategy": "fedtrimmedavg"}) == ""


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"training": {"kind": "first-order"}}, "set training.kind 'zeroth-order'"),
        ({"training": {"schedule": "cosine"}}, "training.schedule"),
        ({"training": {"warmup_steps": 3}}, "training.warmup_steps"),
        ({"training": {"weight_decay": 0.1}}, "decay is no multiple"),
        ({"training": {"momentum": 0.9, "optimizer": "sgd"}}, "training.momentum"),
        ({"training": {"precision": "bf16"}}, "low precision"),
        ({"training": {"max_grad_norm": 1.0}}, "max_scalar"),
        ({"training": {"rule": "adam"}}, "keeps dense state"),
        ({"training": {"rule": "zo-sdg"}}, "did you mean 'zo-sgd'"),
        ({"space": {"mode": "common", "num_seeds": 3}}, "set steps x queries to 3"),
        ({"federation": {"strategy": "fedtrimmedavg"}}, "space.mode 'common'"),
        ({"space": {"mode": "common", "num_seeds": 4}, "evaluation": {"baselines": True}}, "fair comparison"),
        ({"federation": {"strategy": "qfedavg"}}, "qfedavg"),
        ({"federation": {"strategy": {"kind": "fedprox", "proximal_mu": 0.1}}}, "fedprox"),
        ({"federation": {"strategy": "fedadam"}}, "eta"),
        ({"federation": {"strategy": "fedavgm"}, "space": {"mode": "fedkseed-pro"}}, "visit counts"),
        ({"stages": [{"kind": "clip", "clip_norm": 1.0}]}, "max_scalar"),
        ({"stages": [{"kind": "ternary", "density": 0.1}]}, "exact integers"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(tables: dict[str, Any], reason: str) -> None:
    assert reason in problems(**tables)


def test_what_replays_is_said_of_every_rule() -> None:
    assert {name: rule.replays for name, rule in RULES.items()} == {
        "zo-sgd": True,
        "sign": True,
        "conservative": True,
        "momentum": False,
        "adam": False,
        "forward-grad": True,
        "block-wise": True,
        "sparse": True,
        "hybrid": False,
    }
