"""Local privacy: what leaves the client."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kstest, norm  # type: ignore[import-untyped]  # scipy ships no types

from fedpeft.errors import PrivacyError
from fedpeft.privacy.events import Local
from fedpeft.privacy.local import LocalMechanism
from fedpeft.privacy.noise import SeededNoise, SystemNoise
from fedpeft.runtime.randomness import stream
from fedpeft.updates.update import Update, layout_of

FALSE_ALARM = 1e-6
SIZE = 20_000


def source(name: str) -> SeededNoise:
    return SeededNoise(stream(13, name))


def test_noise_is_added_and_nothing_else_leaves() -> None:
    values = stream(1, "v").normal(size=SIZE).astype(np.float32)
    update = Update({"a": values.reshape(100, -1)}, weight=77, metrics={"loss": 0.3, "examples": 77.0})
    sent = LocalMechanism(clip_norm=3.0, noise_multiplier=2.0).privatise(update, source("floats"))
    assert layout_of(sent.arrays) == layout_of(update.arrays)
    assert (sent.weight, dict(sent.metrics)) == (1, {})
    clipped = values.astype(float) * 3.0 / float(np.linalg.norm(values.astype(float)))
    noise = sent.arrays["a"].reshape(-1).astype(float) - clipped
    assert kstest(noise / 6.0, norm.cdf).pvalue > FALSE_ALARM
    assert LocalMechanism(clip_norm=3.0, noise_multiplier=2.0).event() == Local(noise_multiplier=2.0)


def test_values_lie_on_the_grid_whatever_the_data() -> None:
    """The noised numbers are whole quanta, so that their last bits say nothing about the data's."""
    bound = 2.0**-3
    values = (stream(2, "v").normal(size=500) * 1e-3).astype(np.float64)
    sent = LocalMechanism(clip_norm=bound, noise_multiplier=1.0).privatise(
        Update({"a": values}), source("grid")
    )
    quanta = np.ldexp(sent.arrays["a"], 30 + 2)  # 2^-3 is 0.5 * 2^-2, and 30 bits below it
    assert np.array_equal(quanta, np.rint(quanta))


def test_integers_stay_integers() -> None:
    update = Update({"scalars": np.full(SIZE, 7, dtype=np.int64)})
    bound = 7.0 * math.sqrt(SIZE)
    sent = LocalMechanism(clip_norm=bound + 1, noise_multiplier=1.0).privatise(update, source("ints"))
    noise = sent.arrays["scalars"] - 7
    assert noise.dtype == np.int64
    assert kstest(noise / (bound + 1), norm.cdf).pvalue > FALSE_ALARM


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_and_zero_updates_look_alike(bad: float) -> None:
    mechanism = LocalMechanism(clip_norm=1.0, noise_multiplier=1.0)
    broken = mechanism.privatise(Update({"a": np.full(9, bad, dtype=np.float32)}), source("same"))
    zero = mechanism.privatise(Update({"a": np.zeros(9, dtype=np.float32)}), source("same"))
    assert np.array_equal(broken.arrays["a"], zero.arrays["a"])


def test_two_draws_differ() -> None:
    mechanism, update = (
        LocalMechanism(clip_norm=1.0, noise_multiplier=1.0),
        Update({"a": np.zeros(9, np.float32)}),
    )
    one, two = (mechanism.privatise(update, SystemNoise()).arrays["a"] for _ in range(2))
    assert not np.array_equal(one, two)


def test_mixed_kinds_are_refused() -> None:
    update = Update({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.int64)})
    with pytest.raises(PrivacyError, match="floats or integers"):
        LocalMechanism(clip_norm=1.0, noise_multiplier=1.0).privatise(update, SystemNoise())
