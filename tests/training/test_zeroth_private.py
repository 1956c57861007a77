"""Private zeroth order: each step against the mechanism written out, and the unit that a coin draws."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom, kstest  # type: ignore[import-untyped]  # scipy ships no types
from scipy.stats import norm as normal

from fedpeft.config.sections import TrainingSection
from fedpeft.data.encoded import Encoded
from fedpeft.errors import PrivacyError
from fedpeft.privacy.events import PersonLevel, RecordLevel
from fedpeft.privacy.noise import NoiseSource, SeededNoise, SystemNoise
from fedpeft.runtime.randomness import stream
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.trainable_tensors import trainable_parameters
from fedpeft.spaces.base import Route
from fedpeft.training.first_order import Rows
from fedpeft.training.record_mechanism import RecordMechanism, draw_rows
from fedpeft.training.zeroth_private import add_noise_and_average, example_slopes, train
from fedpeft.training.zeroth_prober import prober
from tests.spaces.oracles import sign
from tests.training.rows import attached, loss_of, rows_for

SEED, RADIUS, FALSE_ALARM = 11, 1e-2, 1e-6


def mechanism(**change: Any) -> RecordMechanism:
    values: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "noise_multiplier": 1e-7,
        "sample_rate": 1.0,
        "expected_batch_size": 4.0,
    }
    return RecordMechanism(**(values | change))


def source(name: str = "zo") -> SeededNoise:
    return SeededNoise(stream(3, name))


def moved(model: torch.nn.Module, direction: int, length: float) -> torch.nn.Module:
    """A copy with its parameters moved along a direction, sign by sign."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(trainable_parameters(other).items())):
            row = [sign(SEED, number, direction, place) for place in range(parameter.numel())]
            parameter.add_(length * torch.tensor(row, dtype=torch.float32).view(parameter.shape))
    return other


def slopes_of(model: torch.nn.Module, rows: Rows, directions: list[int]) -> NDArray[np.float64]:
    found = np.zeros((len(rows.indices), len(directions)))
    with torch.no_grad():
        for column, direction in enumerate(directions):
            ends = [moved(model, direction, length) for length in (RADIUS, -RADIUS)]
            for place, index in enumerate(rows.indices):
                above, below = (float(loss_of(end, rows, int(index))) for end in ends)
                found[place, column] = (above - below) / (2 * RADIUS)
    return found


def test_each_record_has_its_own_slopes() -> None:
    model, rows = attached("lora", "llama").eval(), rows_for("llama", (6, 9, 5))
    probe = prober(model, CounterStream(SEED))
    found = example_slopes(probe, rows, rows.indices, [2, 9], RADIUS)
    np.testing.assert_allclose(found, slopes_of(model, rows, [2, 9]), rtol=2e-3, atol=2e-4)
    alone = example_slopes(probe, rows, rows.indices[1:2], [2, 9], RADIUS)
    assert np.array_equal(found[1:2], alone)  # to the last bit: no other record has a part in it


def test_a_step_moves_by_the_clipped_mean() -> None:
    model, rows = attached("lora", "llama").eval(), rows_for("llama", (6, 9, 5))
    slopes = slopes_of(model, rows, [4, 7])
    bound = float(np.median(np.linalg.norm(slopes, axis=1)))  # so that some are cut and some are not
    factors = np.minimum(1.0, bound / np.linalg.norm(slopes, axis=1))
    wanted = (slopes * factors[:, None]).sum(axis=0) / 4.0
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    section = TrainingSection(kind="zeroth-order", lr=0.5, queries=2, radius=RADIUS)
    report, trail = train(
        prober(model, CounterStream(SEED)),
        rows,
        section,
        Route(np.array([4, 7]), exponent=-20, largest=2**30),
        steps=1,
        rng=stream(0, "rng"),
        mechanism=mechanism(max_grad_norm=bound),
        source=source(),
    )
    assert report.event == RecordLevel(noise_multiplier=1e-7, sample_rate=1.0, steps=1)
    np.testing.assert_allclose(np.ldexp(trail.amounts.astype(float), -20), -0.25 * wanted, rtol=5e-3)
    expected = moved(moved_from(model, before), 4, math.ldexp(int(trail.amounts[0]), -20))
    expected = moved(expected, 7, math.ldexp(int(trail.amounts[1]), -20))
    for name, parameter in trainable_parameters(expected).items():
        torch.testing.assert_close(trainable_parameters(model)[name], parameter, rtol=0, atol=1e-6)


def moved_from(model: torch.nn.Module, start: dict[str, torch.Tensor]) -> torch.nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(other).items():
            parameter.copy_(start[name])
    return other


def test_the_noise_is_of_the_promised_width_and_shape() -> None:
    queries = 20_000
    for slopes in (np.zeros((0, queries)), np.full((3, queries), 5.0)):
        mean = add_noise_and_average(slopes, mechanism(max_grad_norm=2.0, noise_multiplier=1.5), source())
        clipped = min(5.0, 2.0 / math.sqrt(queries)) * len(slopes)
        noise = 4.0 * mean - clipped
        assert kstest(noise / 3.0, normal.cdf).pvalue > FALSE_ALARM


def test_a_record_adds_no_more_than_the_bound_and_a_broken_one_nothing() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1e200):
        slopes = rng.normal(size=(5, 8)) * scale
        with_, without = (
            add_noise_and_average(part, mechanism(), source("same")) for part in (slopes, slopes[:-1])
        )
        assert np.linalg.norm(with_ - without) * 4.0 <= 1.0 + 1e-8
    broken = np.array([[np.nan, 1.0], [np.inf, 0.0]])
    same = add_noise_and_average(np.zeros((0, 2)), mechanism(), source("same"))
    assert np.array_equal(add_noise_and_average(broken, mechanism(), source("same")), same)


def test_the_noise_has_nothing_to_do_with_the_directions() -> None:
    """Equal seeds, equal directions: what is sent still differs, as nobody can recompute the noise."""
    model, rows = attached("lora", "llama").eval(), rows_for("llama", (6, 9))
    section = TrainingSection(kind="zeroth-order", lr=0.5, radius=RADIUS)
    start = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}

    def sent(noise: NoiseSource) -> list[int]:
        fresh = prober(moved_from(model, start), CounterStream(SEED))
        route = Route(np.array([4, 7]), exponent=-30, largest=2**40)
        _, trail = train(
            fresh, rows, section, route, steps=2, rng=stream(0, "rng"), mechanism=mechanism(
                noise_multiplier=1.0
            ), source=noise
        )  # fmt: skip
        return [int(amount) for amount in trail.amounts]

    assert sent(source()) == sent(source())
    assert sent(SystemNoise()) != sent(SystemNoise())


def rows_with_users(users: list[int]) -> Rows:
    """Of one token each, all different."""
    tokens, zeros = np.arange(len(users), dtype=np.int32), np.zeros(len(users), dtype=np.int32)
    encoded = Encoded(tokens, np.arange(len(users) + 1), zeros, users=np.array(users, dtype=np.int64))
    return Rows(encoded, np.arange(len(users), dtype=np.int64), "causal-lm", 0)


def test_a_person_enters_by_one_coin_with_any_one_row() -> None:
    """Person 0 has fifty rows, person 1 one: both come as often, and of the fifty each one comes as often."""
    rows, trials, rate = rows_with_users([0] * 50 + [1]), 4000, 0.25
    noise, rng = source("coins"), stream(0, "pick")
    persons = mechanism(sample_rate=rate, unit="person")
    assert persons.event(3) == PersonLevel(noise_multiplier=1e-7, sample_rate=rate, steps=3)
    counts = np.zeros(51)
    for _ in range(trials):
        drawn = draw_rows(rows, persons, noise, int(rng.integers(2**63)))
        assert (drawn < 50).sum() <= 1
        np.add.at(counts, drawn, 1)
    for came, chance in (
        (counts[:50].sum(), rate),
        (counts[50], rate),
        *((c, rate / 50) for c in counts[:50]),
    ):
        low, high = binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], trials, chance)
        assert low <= came <= high


def test_persons_need_a_column() -> None:
    with pytest.raises(PrivacyError, match=r"data\.user"):
        draw_rows(rows_for("llama"), mechanism(unit="person"), source(), 0)


def test_a_person_is_served_by_the_same_row_whoever_else_is_there() -> None:
    """Everybody's coin shows heads; persons of three rows each, in any order, some of them missing."""
    rows, persons = rows_with_users([n % 5 for n in range(15)]), mechanism(unit="person")
    order = stream(0, "order")
    for key in range(40):
        whole = draw_rows(rows, persons, source(), key)
        assert rows.encoded.users is not None
        for left_out in range(5):
            others = order.permutation(rows.indices[rows.encoded.users != left_out])
            fewer = draw_rows(Rows(rows.encoded, others, "causal-lm", 0), persons, source("other"), key)
            assert set(fewer) == {index for index in whole if rows.encoded.users[index] != left_out}
