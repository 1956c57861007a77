"""An attack on the freedom that LoRA's factors have."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.aggregation.robust import lora_pairs
from fedpeft.attacks.base import AttackContext, Labels, wide, with_values
from fedpeft.config.sections import PeftSection, PositiveFloat, Section, unit
from fedpeft.config.traits import Trait, Traits
from fedpeft.updates.update import Update, layout_of


class FactorRotation(Section):
    """Send the honest product B A as (B G^-1)(G A), with G a random rotation times `scale`.

    Whoever looks at the product sees an honest client, and whoever averages factors gets neither. What is not
    a pair of factors is sent honestly.

    Source: ours; that factors are unique up to G is as old as they are.
    """

    kind: ClassVar[str] = "gauge"
    colludes: ClassVar[bool] = False
    traits: ClassVar[Traits] = frozenset({Trait.NEEDS_FACTORS})

    scale: Annotated[PositiveFloat, unit("factor")] = Field(
        10.0, description="How much larger one factor is sent, and how much smaller the other."
    )

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """As they are."""
        return labels

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """The same products, in other factors."""
        values = wide(update.arrays)
        for pair in lora_pairs(layout_of(update.arrays), PeftSection()):
            a, b = (context.state[name].astype(np.float64) for name in (pair.a, pair.b))
            turn = np.linalg.qr(context.rng.standard_normal((len(a), len(a)))).Q
            values[pair.a] = self.scale * turn @ (a + values[pair.a]) - a
            values[pair.b] = (b + values[pair.b]) @ turn.T / self.scale - b
        return with_values(update, values)
