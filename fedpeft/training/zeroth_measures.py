"""How the slope of the loss along a direction is measured: by two nearby losses, or by differentiation.

A measure says what one step learns from one direction; a new one is a function and a line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import Batch
from fedpeft.training.first_order import Rows
from fedpeft.training.zeroth_prober import Prober


@dataclass(frozen=True)
class Slope:
    """What was found along one direction.

    Attributes:
        scalar: derivative of the mean loss along z at theta, or an estimate of it.
        loss: the mean loss at theta, or near it; nats per scored token or class.
    """

    scalar: float
    loss: float


Measure = Callable[[Prober, Sequence[Batch], Rows, int, TrainingSection], Slope]


def difference(
    probe: Prober, batches: Sequence[Batch], rows: Rows, direction: int, section: TrainingSection
) -> Slope:
    """(l(theta + radius z) - l(theta - radius z)) / (2 radius); the error is of order radius^2.

    Source: Spall 1992, equation 2.2, as in Malladi et al. 2023, MeZO.
    """
    above = probe.loss(batches, rows, direction, section.radius)
    below = probe.loss(batches, rows, direction, -section.radius)
    return Slope((above - below) / (2 * section.radius), (above + below) / 2)


def tangent(
    probe: Prober, batches: Sequence[Batch], rows: Rows, direction: int, section: TrainingSection
) -> Slope:
    """The derivative itself, in one pass that carries every activation's derivative along.

    Source: Baydin et al. 2022, "Gradients without backpropagation", with signs for normal directions.
    """
    loss, slope = probe.tangent(batches, rows, direction)
    return Slope(slope, loss)


MEASURES: dict[str, Measure] = {"difference": difference, "tangent": tangent}
