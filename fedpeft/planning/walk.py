"""Whether a zeroth-order run can learn at its rate: what a random walk as long as its moves does to the loss.

A zeroth-order step moves theta by lr g z, of which only a share of about 1/d points downhill: after S steps
the rest is a random walk whose length per parameter is lr |g| sqrt(S). Where such a walk alone raises the
loss much, no run of these steps can lower it. The walk is taken along a few fresh directions, there and
back, so that slopes cancel; g is measured at the start. A walk that raises the loss little promises nothing:
curvature can grow on the way.

Source: the condition lr tr(H) << 1 of Malladi et al. 2023, section 4, measured instead of bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from torch import nn

from fedpeft.config.sections import RunConfig
from fedpeft.data.collate import collate
from fedpeft.data.federated import FederatedData
from fedpeft.planning.draws import RoundsPlan
from fedpeft.spaces.directions import direction_stream
from fedpeft.training.first_order import Rows
from fedpeft.training.zeroth_prober import prober
from fedpeft.training.zeroth_rules import RULES

_ROWS, _SLOPES, _WALKS = 8, 4, 4
_MOST_RISE = (
    0.1  # of the loss at the start; runs that diverged had 0.2 and more, runs that learned 0.03 and less
)
_FIRST_WALK = 1 << 40  # directions that no run uses


@dataclass(frozen=True)
class WalkPlan:
    """A random walk as long as a run's moves.

    Attributes:
        length: per parameter, in the parameters' own unit.
        loss: at the start, nats per scored token (or class), on a few training rows.
        rise: what the walk adds to it in the mean.
        safe_lr: a rate at which the walk would add a tenth of the loss at most.
    """

    length: float
    loss: float
    rise: float
    safe_lr: float

    @property
    def diverges(self) -> bool:
        """Whether the walk alone raises the loss by more than a tenth."""
        return not self.rise <= _MOST_RISE * self.loss


def plan_walk(run: RunConfig, data: FederatedData, model: nn.Module, rounds: RoundsPlan) -> WalkPlan | None:
    """Measure the walk with 17 forward passes on 8 rows; None where steps are no multiples of slopes."""
    section = run.training
    if section.kind != "zeroth-order" or not RULES[section.rule].walks:
        return None
    model.eval()
    probe = prober(model, direction_stream(run, model))
    indices = np.concatenate([client.train for client in data.clients])[:_ROWS]
    rows = Rows(data.rows, indices, run.model.task, 0)  # padding is masked, whatever its id
    batch = [collate(data.rows, indices, 0, task=rows.task)]
    radius = section.radius
    slopes = [
        (probe.loss(batch, rows, z, radius) - probe.loss(batch, rows, z, -radius)) / (2.0 * radius)
        for z in range(_SLOPES)
    ]
    moves = (
        rounds.steps_per_client_round.mean * rounds.rounds / (rounds.asked_per_round.mean * section.queries)
    )
    length = section.lr * math.sqrt(fmean(slope**2 for slope in slopes) * moves)
    loss = probe.loss(batch, rows)
    rise = fmean(
        probe.loss(batch, rows, _FIRST_WALK + walk, side * length) - loss
        for walk in range(_WALKS)
        for side in (1.0, -1.0)
    )
    # For small walks the rise grows with the square of the length.
    shorter = math.sqrt(_MOST_RISE * loss / rise) if rise > 0.0 and math.isfinite(rise) else 0.1
    return WalkPlan(length, loss, rise, section.lr * min(1.0, shorter))
