"""The soak in short: a bad network and a killed server, some seconds of it, and the same bytes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from simulations.soak import AGENTS, Samples, failures, growth, run_soak


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    result = run_soak(tmp_path, minutes=0.1, seed=3, here=True, rounds=4, every_s=0.5)
    assert result["failures"] == []
    assert result["runs"] >= 1
    assert result["updates"] == result["runs"] * 4 * len(AGENTS)
    assert sum(result["troubles"].values()) >= 1
    assert result["bytes_through_the_lines"] > 10_000


@pytest.mark.parametrize(("slope", "found"), [(0.0, 0), (0.2, 1)])
def test_growth_is_found(slope: float, found: int) -> None:
    """A life of ten minutes that leaks a fifth of a MiB each second is one that grows; a sawtooth is not."""
    samples = Samples([(float(s), "server", 7, 500 + 5 * (s % 60 > 50) + slope * s, 40) for s in range(600)])
    grown = growth(samples.longest("server"), 60.0)
    assert grown is not None
    assert grown["mib_grown"] == pytest.approx(slope * 180, abs=6)
    whole = {"runs": 1, "runs_with_the_same_bytes": 1, "runs_with_every_update_counted": 1}
    assert len(failures(whole | {"growth": {"server": grown}})) == found
    assert failures({**whole, "runs_with_the_same_bytes": 0, "growth": {}}) != []


def test_a_short_life_says_nothing() -> None:
    samples = Samples([(float(s), "server", 7, 500.0, 40) for s in range(60)])
    assert growth(samples.longest("server"), 0.0) is None
    assert growth(samples.longest("nobody"), 0.0) is None
    samples.take(time.monotonic(), "nobody", None)
    assert len(samples.rows) == 60
