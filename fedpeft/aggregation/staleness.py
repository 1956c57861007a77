"""How much an update counts that started from an older state.

Weights are counted in whole units of 1/1024, so that a weighted sum of updates stays exact, and so that the
last bit of a power doesn't matter: weights are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

from fedpeft.config.option_tables import build_option
from fedpeft.config.sections import (
    BufferSection,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    StalenessSection,
    unit,
)
from fedpeft.errors import RunFileError

UNIT = 1024  # the weight of a fresh update


class StalenessWeight(Protocol):
    """A weight by staleness: 1 for a fresh update, and never more for an older one."""

    kind: ClassVar[str]

    def weight(self, staleness: int) -> float:
        """The weight of an update whose state was `staleness` rounds old; above 0, at most 1."""
        ...


class Constant(Section):
    """Every update counts the same, whatever its age.

    Source: Xie, Koyejo and Gupta 2019, FedAsync, section 5.2, "constant".
    """

    kind: ClassVar[str] = "constant"

    def weight(self, staleness: int) -> float:
        """1."""
        return 1.0


class Polynomial(Section):
    """(1 + staleness) to the power of minus `exponent`.

    Source: Xie et al. 2019, section 5.2, "polynomial"; with exponent 1/2 the weight of Nguyen et al. 2022,
    FedBuff, section 5.
    """

    kind: ClassVar[str] = "polynomial"

    exponent: Annotated[NonNegativeFloat, unit("power")] = Field(
        0.5, description="How steeply the weight falls; 0: not at all."
    )

    def weight(self, staleness: int) -> float:
        """See the class."""
        return math.pow(1.0 + staleness, -self.exponent)


class Hinge(Section):
    """1 up to a staleness of `after`, then 1 / (1 + `slope` * what is beyond it).

    Source: Xie et al. 2019, section 5.2, "hinge", with a = `slope` and b = `after`; the defaults are theirs.
    """

    kind: ClassVar[str] = "hinge"

    slope: Annotated[PositiveFloat, unit("factor per round")] = Field(
        10.0, description="How steeply the weight falls."
    )
    after: Annotated[int, Field(ge=0), unit("rounds")] = Field(
        4, description="Staleness up to which an update counts in full."
    )

    def weight(self, staleness: int) -> float:
        """See the class."""
        return 1.0 / (1.0 + self.slope * max(0, staleness - self.after))


WEIGHTS: dict[str, Any] = {  # a class that is a StalenessWeight and takes its options by name
    "constant": Constant,
    "hinge": Hinge,
    "polynomial": Polynomial,
}


def staleness_weight(section: StalenessSection) -> StalenessWeight:
    """The weight that a run file asks for.

    Raises:
        RunFileError: an unknown name or option.
    """
    where = "federation.buffer.staleness_weight"
    weight: StalenessWeight = build_option(where, WEIGHTS, section.kind, section.options)
    return weight


def weight_units(section: StalenessSection) -> Callable[[int], int]:
    """Staleness to the weight in units of 1/`UNIT`: from 1 to `UNIT`.

    Raises:
        RunFileError: as `staleness_weight`.
    """
    weight = staleness_weight(section)
    return lambda staleness: max(1, round(UNIT * weight.weight(staleness)))


def weight_problems(section: BufferSection) -> list[str]:
    """What is wrong with the weight, given the oldest update that it must weigh."""
    try:
        least = staleness_weight(section.staleness_weight).weight(section.max_staleness)
    except RunFileError as error:
        return list(error.problems)
    if least * UNIT >= 0.5:
        return []
    return [
        f"federation.buffer.max_staleness: an update {section.max_staleness} rounds old would weigh"
        f" {least:.2g}, and weights are counted in units of 1/{UNIT}; lower it, or the decay of weights"
    ]
