"""A package of somebody else's: a stage, two strategies and a sink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import Section
from fedpeft.config.traits import Trait
from fedpeft.data.embedded.corpus import Row
from fedpeft.stages import StageContext
from fedpeft.updates.update import Update

Arrays = Mapping[str, NDArray[np.float64]]


class Halve(Section):
    """Send half of the update, and double it at the server."""

    kind: ClassVar[str] = "halve"
    role: ClassVar[str] = "neutral"
    payload: ClassVar[str] = "dense"

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Half of it; halving loses no bit."""
        return update.scale(0.5)

    def on_server(self, update: Update, context: StageContext) -> Update:
        """All of it."""
        return update.scale(2.0)


class SlowStart:
    """The mean, in small steps at first; it remembers how many rounds there were."""

    traits = frozenset({Trait.STEP_IS_NOT_THE_MEAN, Trait.REMEMBERS_STEPS})

    def __init__(self, *, rounds: float = 2) -> None:
        self.rounds = rounds
        self.state: dict[str, NDArray[Any]] = {}

    def step(self, number: int, mean: Arrays) -> Arrays:
        """The share of the mean that the rounds so far allow."""
        seen = int(self.state["seen"][0]) + 1 if self.state else 1
        self.state = {"seen": np.array([seen], dtype=np.int64)}
        return {name: array * min(1.0, seen / self.rounds) for name, array in mean.items()}


class Middle:
    """The entry-wise middle of all updates."""

    traits = frozenset({Trait.STEP_IS_NOT_THE_MEAN, Trait.COMPARES_UPDATES})

    def __init__(self) -> None:
        self.state: dict[str, NDArray[Any]] = {}

    def combine(self, number: int, updates: Sequence[Update]) -> Arrays:
        """The median of each entry."""
        names = updates[0].arrays
        return {name: np.median([update.arrays[name] for update in updates], axis=0) for name in names}


class Lines:
    """Writes the kinds of rows to a file."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "lines.txt").open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """One line a row."""
        self._file.write(f"{type(row).__name__}\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_lines(folder: Path, first_round: int) -> Lines:
    """Open the sink of a run."""
    return Lines(folder)
