"""DP-SGD: each step against the algorithm written out, empty batches, refusals, repeatability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import kstest  # type: ignore[import-untyped]  # scipy ships no types
from scipy.stats import norm as normal
from torch import Tensor

from fedpeft.config.sections import TrainingSection
from fedpeft.errors import PrivacyError
from fedpeft.models.trainable import get_arrays, trainable_parameters
from fedpeft.privacy.events import RecordLevel
from fedpeft.privacy.noise import NoiseSource, SeededNoise, SystemNoise
from fedpeft.runtime.randomness import stream
from fedpeft.training.dp_losses import causal_example_losses
from fedpeft.training.dp_sgd import (
    PrivateReport,
    clip_factor,
    private_mode,
    row_gradient,
    sum_clipped,
    train,
)
from fedpeft.training.first_order import Rows
from fedpeft.training.record_mechanism import RecordMechanism
from tests.training.rows import attached, norm, rows_for, single_gradients, still

TINY_NOISE = 1e-7  # of the bound: below what float32 shows, so that steps can be compared
FALSE_ALARM = 1e-6


def mechanism(**change: float) -> RecordMechanism:
    values: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "noise_multiplier": TINY_NOISE,
        "sample_rate": 1.0,
        "expected_batch_size": 5.0,
    }
    return RecordMechanism(**(values | change))


def section(**change: Any) -> TrainingSection:
    return TrainingSection.model_validate({"optimizer": "sgd", "lr": 0.1, "batch_size": 2} | change)


def source(name: str = "dp") -> SeededNoise:
    return SeededNoise(stream(17, name))


def run(
    model: torch.nn.Module,
    rows: Rows,
    mech: RecordMechanism,
    noise: NoiseSource,
    *,
    steps: int = 1,
    **change: Any,
) -> PrivateReport:
    options = section(**change)
    return train(
        model,
        trainable_parameters(model),
        rows,
        options,
        steps=steps,
        rng=stream(1, "dropout"),
        mechanism=mech,
        source=noise,
    )


def sum_by_hand(model: torch.nn.Module, rows: Rows, bound: float) -> dict[str, Tensor]:
    """The algorithm's sum, one row at a time, in float64."""
    parameters = trainable_parameters(model)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for index in rows.indices:
        single = single_gradients(model, parameters, rows, int(index))
        factor = min(1.0, bound / norm(single))
        for name, gradient in single.items():
            total[name] += factor * gradient.double()
    return total


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("bound", [0.05, 1e3])
def test_a_step_is_the_mean_of_clipped_gradients(kind: str, bound: float) -> None:
    """In pieces of two rows; with a small bound all are clipped, with a large one none."""
    model, rows = still(attached("lora", kind)), rows_for(kind)
    before, expected = get_arrays(model), sum_by_hand(model, rows, bound)
    assert norm(expected) > 0.5 * bound if bound < 1 else norm(expected) < bound
    noise = TINY_NOISE if bound < 1 else 1e-9
    report = run(
        model, rows, mechanism(max_grad_norm=bound, noise_multiplier=noise, expected_batch_size=8.0), source()
    )
    after = get_arrays(model)
    for name, total in expected.items():
        moved = (after[name].astype(float) - before[name]) * -8.0 / 0.1
        np.testing.assert_allclose(moved, total.numpy(), rtol=1e-3, atol=3e-5 * norm(expected))
    assert report == PrivateReport(1, RecordLevel(noise_multiplier=noise, sample_rate=1.0, steps=1))


def test_one_row_moves_the_sum_by_at_most_the_bound() -> None:
    """Also where its loss is scaled up a millionfold, and whatever the other rows are."""
    kind, bound = "bert", 0.01
    moved = []
    for count in (4, 5):
        model, rows = still(attached("head", kind)), rows_for(kind)
        rows = Rows(rows.encoded, rows.indices[:count], rows.task, rows.pad_id)
        before = get_arrays(model)
        run(model, rows, mechanism(max_grad_norm=bound, expected_batch_size=1.0), source(), lr=1.0)
        after = get_arrays(model)
        moved.append({name: after[name].astype(float) - before[name] for name in before})
    difference = math.hypot(*(float(np.linalg.norm(moved[1][n] - moved[0][n])) for n in moved[0]))
    assert 0.99 * bound < difference < bound * (1 + 1e-4)


@pytest.mark.parametrize(("method", "kind"), [("lora", "llama"), ("bitfit", "bert"), ("p-tuning", "llama")])
def test_a_sum_is_that_of_its_rows_to_the_last_bit(method: str, kind: str) -> None:
    """With dropout on, in any order, of unequal lengths: neither masks nor padding carry over."""
    model, rows = attached(method, kind), rows_for(kind, (7, 12, 5, 9, 10, 3))
    parameters, mech = trainable_parameters(model), mechanism(max_grad_norm=0.05)

    def quanta(drawn: Sequence[int]) -> dict[str, Tensor]:
        with private_mode(model, section()):
            indices = np.array(drawn, dtype=np.int64)
            return sum_clipped(model, parameters, rows, indices, section(), mech, step_key=5)

    singles = [quanta([index]) for index in range(6)]
    for drawn in ([0, 1, 2, 3, 4, 5], [5, 2, 0], [3, 1]):
        whole = quanta(drawn)
        for name in parameters:
            assert torch.equal(whole[name], sum((singles[i][name] for i in drawn), torch.zeros(1).long()))
    for single in singles:
        length = math.sqrt(sum(float(total.double().square().sum()) for total in single.values()))
        assert 0 < length <= mech.sensitivity(sum(p.numel() for p in parameters.values()))


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"precision": "bf16"}])
def test_rows_are_apart_with_less_memory_too(change: dict[str, Any]) -> None:
    """Checkpointing computes activations again under the masks of the first time, so nothing differs."""
    model, rows = attached("lora", "bert"), rows_for("bert")
    parameters, mech, options = trainable_parameters(model), mechanism(), section(**change)
    sums = []
    for drawn in ([0, 1, 2], [0, 2], [1]):
        with private_mode(model, options):
            indices = np.array(drawn, dtype=np.int64)
            sums.append(sum_clipped(model, parameters, rows, indices, options, mech, step_key=5))
    assert all(torch.equal(sums[0][name], sums[1][name] + sums[2][name]) for name in parameters)
    with private_mode(model, section()):
        plain = sum_clipped(model, parameters, rows, np.array([0, 1, 2]), section(), mech, step_key=5)
    same = all(torch.equal(sums[0][name], plain[name]) for name in parameters)
    assert same == ("gradient_checkpointing" in change)


def test_dropout_of_a_row_is_seeded_by_the_row_and_the_step() -> None:
    model, rows = attached("head", "bert"), rows_for("bert")
    parameters = trainable_parameters(model)
    with private_mode(model, section()):
        first, again, other = (row_gradient(model, parameters, rows, 0, section(), key) for key in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_noise_has_the_promised_width_also_in_an_empty_step() -> None:
    """No row is drawn at this rate, so every step is noise: z * C * lr / expected, over five steps."""
    model, rows = attached("lora", "bert"), rows_for("bert")
    before = get_arrays(model)
    mech = mechanism(sample_rate=1e-12, noise_multiplier=2.0, max_grad_norm=0.5, expected_batch_size=4.0)
    run(model, rows, mech, source("empty"), steps=5)
    after = get_arrays(model)
    noise = np.concatenate([(after[n].astype(float) - before[n]).reshape(-1) for n in before])
    assert kstest(noise / (0.1 * 2.0 * 0.5 / 4.0 * math.sqrt(5)), normal.cdf).pvalue > FALSE_ALARM


class Watched:
    """Counts the words of a source."""

    def __init__(self) -> None:
        self.inner, self.words_drawn = source("watched"), 0

    def words(self, count: int) -> NDArray[np.uint64]:
        self.words_drawn += count
        return self.inner.words(count)


def test_noise_and_coins_come_from_the_source_and_torchs_generator_is_left_alone() -> None:
    watched, state = Watched(), torch.get_rng_state()
    model = attached("head", "bert")
    run(model, rows_for("bert"), mechanism(noise_multiplier=1.0), watched)
    assert watched.words_drawn > sum(p.numel() for p in trainable_parameters(model).values())
    assert torch.equal(state, torch.get_rng_state())


def test_seeded_runs_repeat_and_system_runs_do_not() -> None:
    def trained(noise: NoiseSource) -> dict[str, np.ndarray]:
        model = attached("lora", "llama")
        run(model, rows_for("llama"), mechanism(noise_multiplier=1.0, sample_rate=0.5), noise, steps=3)
        return dict(get_arrays(model))

    first, again, other = trained(source("r")), trained(source("r")), trained(SystemNoise())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_the_model_can_train_without_privacy_afterwards() -> None:
    model, rows = attached("lora", "llama"), rows_for("llama")
    parameters = trainable_parameters(model)
    run(model, rows, mechanism(), source())
    single_gradients(model, parameters, rows, 0)
    assert all(p.grad is None for p in parameters.values())
    assert not model.training
    run(model, rows, mechanism(), source())  # and with privacy again


def test_a_row_without_scored_tokens_and_rows_of_other_lengths_do_not_couple() -> None:
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[-100, 1, 2, -100, -100, -100], [-100] * 6, [-100, 3, 4, 5, 6, 7]])
    losses = causal_example_losses(logits, labels)
    by_hand = [
        -torch.log_softmax(logits[i], -1)[
            [t - 1 for t in range(6) if labels[i, t] >= 0], labels[i][labels[i] >= 0]
        ].mean()
        for i in (0, 2)
    ]
    assert losses[1] == 0
    torch.testing.assert_close(losses[[0, 2]], torch.stack(by_hand))


def test_rows_whose_gradient_is_not_finite_add_nothing() -> None:
    gradients = [([3.0, 4.0], 0.0), ([math.nan, 0.0], 1.0), ([0.0, 0.0], math.inf), ([0.3, 0.0], 0.4)]
    factors = [clip_factor({"a": torch.tensor(a), "b": torch.tensor(b)}, 1.0) for a, b in gradients]
    assert factors == pytest.approx([0.2, 0.0, 0.0, 1.0], rel=1e-5)
    assert 0 < clip_factor({"a": torch.full((4,), 2.0e38)}, 1.0) < 1e-38
    assert clip_factor({}, 1.0) == 1.0


def test_a_broken_model_still_releases_only_noise() -> None:
    model = attached("head", "bert")
    parameters = trainable_parameters(model)
    with torch.no_grad():
        next(iter(parameters.values())).fill_(math.inf)
    finite = {n: a for n, a in get_arrays(model).items() if np.isfinite(a).all()}
    run(model, rows_for("bert"), mechanism(noise_multiplier=1.0), source("broken"))
    after = get_arrays(model)
    assert finite
    assert all(
        np.isfinite(after[name]).all() and not np.array_equal(after[name], a) for name, a in finite.items()
    )


@pytest.mark.parametrize(
    "change",
    [
        {"fused_update": True},
        {"sampled_layers": 1},
        {"max_grad_norm": 1.0},
        {"gradient_accumulation": 2},
    ],
)
def test_options_that_privacy_cannot_honour_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match=f"training.{next(iter(change))}") as caught:
        run(attached("head", "bert"), rows_for("bert"), mechanism(), source(), **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"max_grad_norm": 0.0}, {"noise_multiplier": 0.0}, {"sample_rate": 1.1}, {"expected_batch_size": 0.0}],
)
def test_impossible_mechanisms_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(PrivacyError):
        mechanism(**change)


@pytest.mark.parametrize(("optimizer", "mu"), [("adamw", 0.0), ("sgd", 0.5)])
def test_other_optimisers_and_the_proximal_pull_work_on_the_noised_gradient(
    optimizer: str, mu: float
) -> None:
    model, rows = attached("lora", "bert"), rows_for("bert")
    seen: list[int] = []
    report = train(
        model,
        trainable_parameters(model),
        rows,
        section(optimizer=optimizer, schedule="linear"),
        steps=3,
        rng=stream(1, "d"),
        mechanism=mechanism(noise_multiplier=0.5),
        source=source(),
        proximal_mu=mu,
        on_step=seen.append,
    )
    assert seen == [1, 2, 3]
    assert report.event.steps == 3
    assert all(np.isfinite(a).all() for a in get_arrays(model).values())
