"""Record-level privacy without back-propagation: noised sums of clipped directional derivatives.

Only a few scalars per step touch the rows, so the noise has as many dimensions as a step has directions,
however large the model is. What is made of the noised scalars, the moves and the integers that are sent,
costs nothing.

Source: Zhang et al. 2024, DPZero, algorithm 1; Tang et al. 2024, DP-ZO. We differ in sampling each record by
its own coin, as the accountant is told, in noise that has nothing to do with the directions' public stream,
and in sums of whole quanta, so that the noise is exact.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import collate
from fedpeft.errors import PrivacyError
from fedpeft.privacy.clipping import INWARD
from fedpeft.privacy.discrete_gaussian import discrete_gaussian
from fedpeft.privacy.noise import NoiseSource
from fedpeft.runtime.cancellation import check_cancelled
from fedpeft.spaces.base import Route, Trail
from fedpeft.training.dp_sgd import PrivateReport
from fedpeft.training.first_order import Rows
from fedpeft.training.losses import PRECISE_LOSSES
from fedpeft.training.record_mechanism import RecordMechanism, draw_rows
from fedpeft.training.zeroth_moves import build_mover
from fedpeft.training.zeroth_prober import Prober


def train(
    probe: Prober,
    rows: Rows,
    section: TrainingSection,
    route: Route,
    *,
    steps: int,
    rng: np.random.Generator,
    mechanism: RecordMechanism,
    source: NoiseSource,
) -> tuple[PrivateReport, Trail]:
    """Train the prober's parameters in place for `steps` noised steps of `section.queries` directions each.

    A step is one release: each record that its coin lets in adds its derivatives along all of the step's
    directions, a vector cut to length `max_grad_norm`. `section.max_scalar` cuts what has been noised.

    Args:
        rng: one number per step, the key of the choice among a person's rows; needs no secrecy.

    Raises:
        TrainingError: a noised move left the agreed range.
    """
    mover = build_mover(probe, rows, section, route)
    amounts = np.zeros(len(route.directions), dtype=np.int64)
    for step in range(steps):
        check_cancelled()
        visits = range(step * section.queries, (step + 1) * section.queries)
        directions = [int(route.directions[visit]) for visit in visits]
        drawn = draw_rows(rows, mechanism, source, int(rng.integers(2**63)))
        slopes = example_slopes(probe, rows, drawn, directions, section.radius)
        for visit, scalar in zip(visits, add_noise_and_average(slopes, mechanism, source), strict=True):
            cut = float(np.clip(scalar, -(section.max_scalar or math.inf), section.max_scalar or math.inf))
            amounts[visit] = mover.step(int(route.directions[visit]), cut, _nothing_more)
        mover.close_step()
    mover.finish()
    return PrivateReport(steps, mechanism.event(steps)), Trail(route.directions, amounts)


def example_slopes(
    probe: Prober, rows: Rows, drawn: NDArray[np.int64], directions: list[int], radius: float
) -> NDArray[np.float64]:
    """Each record's own (l(theta + radius z) - l(theta - radius z)) / (2 radius), float64[B, Q].

    Each record goes through the model alone. Side by side, padding and the choice of kernels would let one
    record change the last bits of another's losses, which division by the radius magnifies and no clipping
    bounds.
    """
    batches = [collate(rows.encoded, np.array([index]), rows.pad_id, task=rows.task) for index in drawn]
    tokens = np.array([max(1, batch.tokens) for batch in batches], dtype=np.float64)
    slopes = np.zeros((len(drawn), len(directions)))
    for column, direction in enumerate(directions):
        above, below = (
            np.array(probe.evaluate(batches, PRECISE_LOSSES[rows.task], direction, scale), dtype=np.float64)
            for scale in (radius, -radius)
        )
        with np.errstate(
            invalid="ignore"
        ):  # infinite losses: their record adds nothing, see `add_noise_and_average`
            slopes[:, column] = (above - below) / tokens / (2.0 * radius)
    return slopes


def sum_clipped(slopes: NDArray[np.float64], mechanism: RecordMechanism) -> NDArray[np.int64]:
    """Clip each record's row of slopes and sum them in the mechanism's quanta: int64[Q].

    A row that isn't finite adds nothing: a refusal would tell about the record.
    """
    bound = mechanism.max_grad_norm
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float64 counts as not finite
        norms = np.sqrt(np.sum(np.square(slopes), axis=1))
    kept = np.isfinite(norms)
    factors = np.minimum(1.0, bound * INWARD / np.maximum(norms[kept], np.finfo(np.float64).tiny))
    scaled = np.ldexp(slopes[kept] * factors[:, None], -mechanism.exponent)
    total: NDArray[np.int64] = np.rint(scaled).astype(np.int64).sum(axis=0)
    return total


def add_noise_and_average(
    slopes: NDArray[np.float64], mechanism: RecordMechanism, source: NoiseSource
) -> NDArray[np.float64]:
    """Add noise to the clipped sum and divide by the expected batch size: float64[Q]."""
    total = sum_clipped(slopes, mechanism)
    noise = discrete_gaussian(source, mechanism.noise_std(len(total)), len(total))
    noised: NDArray[np.float64] = np.ldexp((total + noise).astype(np.float64), mechanism.exponent)
    return noised / mechanism.expected_batch_size


def _nothing_more() -> float:
    """What rules that look at the loss before they move are told.

    Raises:
        PrivacyError: always; such a rule would release more than the noised scalars.
    """
    raise PrivacyError("a rule asked for the loss itself, which is private; choose training.rule 'zo-sgd'")
