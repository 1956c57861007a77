"""From events to (epsilon, delta): Rényi accounting at whole orders, by `dp_accounting`.

Why Rényi and why whole orders. Our noise is a discrete Gaussian on integers, not a continuous one. For an
integer shift v and whole k, E_Q[(P_v / Q)^k] over the lattice is exp((k^2 - k) |v|^2 / 2 sigma^2) exactly:
the weighted sum over x is a shifted copy of the normaliser. So the Poisson-sampled moments at whole orders,
sums of such terms, are those of the continuous Gaussian, in any dimension, and the reflection x -> v - x maps
the lattice to itself, which makes adding the worse direction (Mironov, Talwar, Zhang 2019, theorem 5).
Privacy loss distributions are tighter by a tenth but are built for the continuous, one-dimensional Gaussian;
`tighter_epsilon` gives that number as a cross-check (Opacus's PRV accountant agrees with it), never as the
promise.

Source: Mironov, Talwar, Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", section
3.3 (whole orders); Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", theorem
4, and proposition 12 for the conversion.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import MAX_DELTA
from fedpeft.errors import PrivacyError
from fedpeft.privacy.events import Event, one_kind

if TYPE_CHECKING:
    import dp_accounting

# `dp_accounting` is imported where a private run needs it: and brings SciPy

# Whole orders only, see above. Large ones serve small epsilons; between the best order and its neighbour here
# lies less than a thousandth of epsilon, and a curve takes time in proportion to the orders' sum.
ORDERS: tuple[int, ...] = (*range(2, 64), *range(64, 128, 4), *range(128, 256, 8), *range(256, 1025, 64))

MAX_MULTIPLIER = 1e6  # beyond it calibration gives up
MULTIPLIER_STEP = 1e-4  # calibrated multipliers are rounded up to it, so that a run file can quote them


def epsilon(events: Sequence[Event], target_delta: float) -> float:
    """The epsilon that all `events` together cost at `target_delta`; 0 without events.

    Raises:
        PrivacyError: events of two kinds, or a delta that promises nothing.
    """
    one_kind(events)
    check_delta(target_delta)
    curve = np.zeros(len(ORDERS))
    for event, times in Counter(events).items():
        release = event.release()
        curve += _curve(release.noise_multiplier, release.sample_rate) * (release.count * times)
    if not curve.any():
        return 0.0
    from dp_accounting import rdp

    return max(0.0, float(rdp.compute_epsilon(ORDERS, curve, target_delta)[0]))


def tighter_epsilon(events: Sequence[Event], target_delta: float) -> float:
    """What a privacy-loss-distribution accountant says of the continuous Gaussian: a cross-check only.

    Raises:
        PrivacyError: as `epsilon`.
    """
    one_kind(events)
    check_delta(target_delta)
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for event, times in Counter(events).items():
        release = event.release()
        accountant.compose(_dp_event(release.noise_multiplier, release.sample_rate), release.count * times)
    return float(accountant.get_epsilon(target_delta))


def noise_multiplier_for(
    target_epsilon: float, target_delta: float, events_of: Callable[[float], Sequence[Event]]
) -> float:
    """The smallest multiplier, in steps of `MULTIPLIER_STEP`, whose whole run stays within `target_epsilon`.

    Args:
        events_of: from a noise multiplier to all events of the run, e.g.
            ``lambda z: [ClientLevel(noise_multiplier=z, sample_rate=0.1)] * rounds``.

    Raises:
        PrivacyError: a target that is not positive, or that no multiplier up to `MAX_MULTIPLIER` meets.
    """
    if not 0.0 < target_epsilon < math.inf:
        raise PrivacyError(f"target epsilon {target_epsilon!r} came; a positive number is needed")

    def cost(steps: int) -> float:
        return epsilon(events_of(steps * MULTIPLIER_STEP), target_delta)

    low, high = 0, round(0.5 / MULTIPLIER_STEP)  # epsilon falls as noise grows, so bisection finds the edge
    while cost(high) > target_epsilon:
        low, high = high, 2 * high
        if high * MULTIPLIER_STEP > MAX_MULTIPLIER:
            raise PrivacyError(
                f"no noise multiplier up to {MAX_MULTIPLIER:g} gives epsilon {target_epsilon:g} at delta"
                f" {target_delta:g}; allow a larger epsilon or fewer rounds"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) > target_epsilon else (low, middle)
    return round(high * MULTIPLIER_STEP, 10)


def check_delta(target_delta: float) -> None:
    """Refuse a delta that promises nothing.

    Raises:
        PrivacyError: not between 0 and `MAX_DELTA`.
    """
    if not 0.0 < target_delta < MAX_DELTA:
        raise PrivacyError(
            f"target_delta {target_delta!r} came; it must lie between 0 and {MAX_DELTA:g}, well below one"
            " over the number of protected units"
        )


@lru_cache(maxsize=4096)  # a run has one curve or, in calibration, some dozens
def _curve(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Rényi divergences of one release at `ORDERS`, float64[len(ORDERS)], read-only."""
    from dp_accounting import NeighboringRelation, rdp

    accountant = rdp.RdpAccountant(ORDERS, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(_dp_event(noise_multiplier, sample_rate))
    curve: NDArray[np.float64] = np.asarray(accountant.rdp, dtype=np.float64).copy()
    curve.flags.writeable = False
    return curve


def _dp_event(noise_multiplier: float, sample_rate: float) -> dp_accounting.DpEvent:
    import dp_accounting

    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return gaussian if sample_rate == 1.0 else dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian)
