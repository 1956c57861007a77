"""Attacks that one client makes alone, from its own update."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.attacks.base import AttackContext, Labels, wide, with_values
from fedpeft.config.sections import PositiveFloat, Section, unit
from fedpeft.config.traits import Trait, Traits
from fedpeft.updates.update import Update


class SignFlip(Section):
    """Send the update times -`scale`.

    Source: Li, Xu, Chen, Giannakis and Ling 2019, RSA, section 5.2, where the scale is 3.
    """

    kind: ClassVar[str] = "sign-flip"
    colludes: ClassVar[bool] = False

    scale: Annotated[PositiveFloat, unit("factor")] = Field(
        1.0, description="The update is sent times minus this."
    )

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """As they are."""
        return labels

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """Turned round."""
        return with_values(update, {name: -self.scale * array for name, array in wide(update.arrays).items()})


class Scaled(Section):
    """Send the update times `scale`: the right direction, so far that the model is thrown over.

    Source: the boosting of Bagdasaryan, Veit, Hua, Estrin and Shmatikov 2020, equation 3, without a backdoor.
    """

    kind: ClassVar[str] = "scaled"
    colludes: ClassVar[bool] = False

    scale: Annotated[PositiveFloat, unit("factor")] = Field(
        10.0, description="The update is sent times this."
    )

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """As they are."""
        return labels

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """Blown up."""
        return with_values(update, {name: self.scale * array for name, array in wide(update.arrays).items()})


class NoiseAttack(Section):
    """Send normal noise instead of an update, per array `scale` times its root mean square.

    Source: Blanchard, El Mhamdi, Guerraoui and Stainer 2017, section 5 (Gaussian attackers). There the
    variance is one number; here it follows the arrays, so that no array gives the attacker away by its size.
    """

    kind: ClassVar[str] = "noise"
    colludes: ClassVar[bool] = False

    scale: Annotated[PositiveFloat, unit("factor")] = Field(
        10.0, description="Size of the noise, as a multiple of the root mean square of what it replaces."
    )

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """As they are."""
        return labels

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """Noise; an array of zeros stays one."""
        values = wide(update.arrays)
        for name in sorted(values):
            size = math.sqrt(float(np.mean(np.square(values[name])))) if values[name].size else 0.0
            values[name] = self.scale * size * context.rng.standard_normal(values[name].shape)
        return with_values(update, values)


class LabelFlip(Section):
    """Train on rows whose class c is called C - 1 - c, and send what comes of it.

    Source: Fang, Cao, Jia and Gong 2020, section 5.1. With an odd number of classes the middle one stays.
    """

    kind: ClassVar[str] = "label-flip"
    colludes: ClassVar[bool] = False
    traits: ClassVar[Traits] = frozenset({Trait.NEEDS_CLASSES})

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """Counted from the other end."""
        return classes - 1 - labels

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """As it is."""
        return update
