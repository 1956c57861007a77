"""The virtual clock: draws by name and round, and arithmetic that can be done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpeft.config.sections import ClockSection
from fedpeft.rounds.simulated_clock import VirtualClock

SIGMAS = 6.0  # of a normal: a correct clock fails one such check in 5e8 seeds


def test_a_plain_clock_adds_latency_transfer_and_training() -> None:
    clock = VirtualClock(ClockSection(examples_per_s=50, bytes_per_s=1000, latency_s=0.25), seed=1)
    fate = clock.fate("a", 1, examples=100, bytes_down=1500, bytes_up=500)
    assert fate.arrives_s == pytest.approx(0.25 + 2.0 + 2.0)
    assert not fate.vanishes
    assert all(clock.available("a", round_) for round_ in range(50))


def test_speeds_are_lognormal_around_the_median() -> None:
    count, sigma = 3000, 0.8
    clock = VirtualClock(ClockSection(examples_per_s=20, speed_sigma=sigma), seed=2)
    logs = np.log([clock.examples_per_s(f"c{index}") / 20 for index in range(count)])
    assert abs(logs.mean()) < SIGMAS * sigma / math.sqrt(count)
    assert abs(logs.std() - sigma) < SIGMAS * sigma / math.sqrt(2 * count)
    assert clock.examples_per_s("c7") == clock.examples_per_s("c7")


@pytest.mark.parametrize("chance", [0.1, 0.9])
def test_absences_happen_as_often_as_asked(chance: float) -> None:
    count = 3000
    clock = VirtualClock(ClockSection(availability=chance, dropout=chance), seed=3)
    bound = SIGMAS * math.sqrt(count * chance * (1 - chance))
    there = np.array([clock.available(f"c{index}", 1) for index in range(count)])
    gone = np.array(
        [clock.fate(f"c{i}", 1, examples=1, bytes_down=0, bytes_up=0).vanishes for i in range(count)]
    )
    assert abs(there.sum() - count * chance) < bound
    assert abs(gone.sum() - count * chance) < bound
    # two independent coins, not one: they agree as often as chance says
    agree = chance**2 + (1 - chance) ** 2
    assert abs((there == gone).sum() - count * agree) < SIGMAS * math.sqrt(count * agree * (1 - agree))


def test_a_fate_is_of_client_round_and_seed_only() -> None:
    section = ClockSection(availability=0.5, dropout=0.5, speed_sigma=1.0)

    def story(seed: int, clients: list[str]) -> dict[tuple[str, int], tuple[bool, float]]:
        clock = VirtualClock(section, seed)
        return {
            (client, round_): (
                clock.available(client, round_),
                clock.fate(client, round_, examples=10, bytes_down=1, bytes_up=1).arrives_s,
            )
            for client in clients
            for round_ in range(20)
        }

    whole = story(4, ["a", "b", "c"])
    assert story(4, ["c", "a"]).items() <= whole.items()
    assert story(5, ["a", "b", "c"]) != whole
    assert len({whole["a", round_] for round_ in range(20)}) > 1
