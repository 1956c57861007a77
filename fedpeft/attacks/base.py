"""The seam: what an attack must say.

An attack stands where a hostile client would put it: behind the space, which expresses what was trained, and
before the stages, whose promises everybody keeps (a client that broke those would be refused). Or at the
rows, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.traits import NO_TRAITS, Trait, Traits, choose_traits
from fedpeft.updates.update import Arrays, Update

Labels = NDArray[np.int64]
Wide = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class AttackContext:
    """What an attacker may know.

    Attributes:
        rng: this client's own stream for this round.
        state: what the update is a change of.
        clients: how many the run has.
        attackers: how many of them are hostile.
        honest: what all hostile clients would have sent had they been honest, in the order of their names.
            They train for it, whether or not they are asked in this round, so it is called only if needed.
    """

    rng: np.random.Generator
    state: Arrays
    clients: int
    attackers: int
    honest: Callable[[], Sequence[Update]]


class Attack(Protocol):
    """What a hostile client does, in two hooks of which an attack uses one.

    Attributes:
        kind: name in the run file.
        colludes: it is made from what several attackers know.
    """

    kind: ClassVar[str]
    colludes: ClassVar[bool]

    def on_labels(self, labels: Labels, classes: int) -> Labels:
        """The labels that it trains on, given those of its rows; neither changes its argument."""
        ...

    def on_update(self, update: Update, context: AttackContext) -> Update:
        """What it sends, given what an honest client would have sent in its place."""
        ...


def attack_traits(attack: Attack) -> Traits:
    """Return what an attack is: what every one is, whether it colludes, and what it declares in `traits`."""
    declared: Traits = getattr(attack, "traits", NO_TRAITS)
    return declared | choose_traits({Trait.HOSTILE: True, Trait.COLLUDES: attack.colludes})


def wide(arrays: Arrays) -> Wide:
    """The arrays in float64, to calculate with."""
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def with_values(update: Update, values: Wide) -> Update:
    """`update` with other values, in its own dtypes; where these are integers, to the nearest one."""

    def like(name: str, array: NDArray[Any]) -> NDArray[Any]:
        value = values[name]
        return (np.rint(value) if array.dtype.kind == "i" else value).astype(array.dtype)

    return replace(update, arrays={name: like(name, array) for name, array in update.arrays.items()})
