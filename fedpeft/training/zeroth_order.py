"""Local training without back-propagation: forward passes at theta + radius z and theta - radius z.

The model stays in evaluation mode (a difference of losses under two dropout masks is noise), losses are
computed in float32 and summed in float64, and weights are perturbed on the way through the forward pass, so
that measuring never touches them.

Source: Spall 1992; Malladi et al. 2023, MeZO, algorithm 1. We differ in the direction (signs from a counter),
in perturbing just in time, and in rounding every move to a whole number of quanta *before* it is made: the
integers that a client sends are the ones that its own trajectory used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import Batch, collate, training_batches
from fedpeft.errors import TrainingError
from fedpeft.runtime.cancellation import check_cancelled
from fedpeft.spaces.base import Route, Trail
from fedpeft.training.first_order import Rows, TrainingReport
from fedpeft.training.zeroth_measures import MEASURES, Slope
from fedpeft.training.zeroth_moves import Mover, build_mover
from fedpeft.training.zeroth_prober import Prober
from fedpeft.training.zeroth_rules import RULES


def train(
    probe: Prober,
    rows: Rows,
    section: TrainingSection,
    route: Route,
    *,
    steps: int,
    rng: np.random.Generator,
) -> tuple[TrainingReport, Trail]:
    """Train the prober's parameters in place for `steps` steps of `section.queries` directions each.

    The directions of one step are measured at one point on one batch, and their moves are averaged.

    Args:
        route: the directions in order, `steps * section.queries` of them.

    Raises:
        TrainingError: a loss became NaN or infinite, or a move left the agreed range.
    """
    batches = _batches(rows, section, steps, rng)
    mover = build_mover(probe, rows, section, route)
    amounts = np.zeros(len(route.directions), dtype=np.int64)
    total, seen = 0.0, 0
    for step in range(steps):
        check_cancelled()
        batch = next(batches)
        visits = range(step * section.queries, (step + 1) * section.queries)
        losses = _step(probe, rows, section, route, mover, batch, visits, amounts)
        total += math.fsum(losses) / len(losses)
        seen += sum(part.examples for part in batch)
    mover.finish()
    return TrainingReport(total / steps, steps, seen), Trail(route.directions, amounts)


def _step(
    probe: Prober,
    rows: Rows,
    section: TrainingSection,
    route: Route,
    mover: Mover,
    batch: Sequence[Batch],
    visits: range,
    amounts: NDArray[np.int64],
) -> list[float]:
    """Measure every direction of a step, then make its moves; the losses that were measured."""
    measure = MEASURES[RULES[section.rule].measure]
    measured, losses = [], []
    for visit in visits:
        slope = measure(probe, batch, rows, int(route.directions[visit]), section)
        losses.append(slope.loss)
        measured.append(_scalar(slope, section, visit))
    mover.look(batch)
    for visit, scalar in zip(visits, measured, strict=True):
        amounts[visit] = mover.step(int(route.directions[visit]), scalar, lambda: probe.loss(batch, rows))
    mover.close_step()
    return losses


def _scalar(slope: Slope, section: TrainingSection, visit: int) -> float:
    """The directional derivative, cut to `max_scalar`.

    Raises:
        TrainingError: it is not finite.
    """
    scalar = slope.scalar
    if not math.isfinite(scalar):
        raise TrainingError(
            f"the loss is {slope.loss} and its slope {scalar} at visit {visit + 1}; lower training.lr (now"
            f" {section.lr:g}) or training.radius (now {section.radius:g}), or look for broken rows"
        )
    if section.max_scalar is None:
        return scalar
    return max(-section.max_scalar, min(section.max_scalar, scalar))


def _batches(
    rows: Rows, section: TrainingSection, steps: int, rng: np.random.Generator
) -> Iterator[list[Batch]]:
    """One list of micro-batches per step."""
    micro = section.gradient_accumulation
    order = training_batches(rows.encoded, rows.indices, section.batch_size, steps * micro, rng)
    for _ in range(steps):
        yield [collate(rows.encoded, next(order), rows.pad_id, task=rows.task) for _ in range(micro)]
