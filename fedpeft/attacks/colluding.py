"""Attacks that hostile clients make together, from what each of them would honestly have sent.

All of them send the same values, and none of them sees an honest client's update: they take their own for a
sample of everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.attacks.base import AttackContext, Labels, Wide, with_values
from fedpeft.config.sections import PositiveFloat, Section, unit
from fedpeft.updates.update import Update

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Of a stack of one array, [attackers, ...], over its first axis."""


class LittleIsEnough(Section):
    """Send mean - z * deviation of the attackers' honest updates, entry by entry: within the crowd's spread.

    Without `z`, the largest for which enough honest clients are farther out to make the attackers look like
    the majority: Phi^-1((n - m - s) / (n - m)), with n clients, m attackers and s = floor(n / 2 + 1) - m.

    Source: Baruch, Baruch and Goldberg 2019, "A Little Is Enough", algorithm 3.
    """

    kind: ClassVar[str] = "alie"
    colludes: ClassVar[bool] = True

    z: Annotated[PositiveFloat, unit("standard deviations")] | None = Field(
        None, description="How far from the mean. Default: follows from the numbers of clients and attackers."
    )

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """As they are."""
        return labels

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """The same for all attackers."""
        honest = context.honest()
        z = reach(context.clients, context.attackers) if self.z is None else self.z
        deviation = _over(honest, lambda stack: stack.std(axis=0))
        return with_values(update, {name: mean - z * deviation[name] for name, mean in _mean(honest).items()})


class InnerProduct(Section):
    """Send -`scale` times the mean of the attackers' honest updates.

    With a small scale the sum stays near the honest ones, at an angle beyond the right one.

    Source: Xie, Koyejo and Gupta 2019, "Fall of Empires", section 4; the scale is its epsilon.
    """

    kind: ClassVar[str] = "inner-product"
    colludes: ClassVar[bool] = True

    scale: Annotated[PositiveFloat, unit("factor")] = Field(
        0.5, description="The mean is sent times minus this."
    )

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """As they are."""
        return labels

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """The same for all attackers."""
        mean = _mean(context.honest())
        return with_values(update, {name: -self.scale * array for name, array in mean.items()})


def reach(clients: int, attackers: int) -> float:
    """`z` of Baruch et al. 2019, at least 0."""
    honest = clients - attackers
    supporters = clients // 2 + 1 - attackers
    share = (honest - supporters) / honest if honest else 0.0
    return max(0.0, NormalDist().inv_cdf(min(max(share, 1e-6), 1.0 - 1e-6)))


def _mean(updates: Sequence[Update]) -> Wide:
    return _over(updates, lambda stack: stack.mean(axis=0))


def _over(updates: Sequence[Update], function: Statistic) -> Wide:
    names = updates[0].arrays
    return {
        name: function(np.stack([update.arrays[name].astype(np.float64) for update in updates]))
        for name in names
    }
