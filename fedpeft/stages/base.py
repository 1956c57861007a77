"""The seam: what a stage must say, and how stages are run."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.randomness import stream
from fedpeft.update import Update


@dataclass(frozen=True)
class StageContext:
    """What a stage may know: the round, whose update it is, randomness, and a memory.

    Attributes:
        seed: the run's.
        round: from 1.
        client: the sender's name.
        memory: arrays a client keeps from round to round (error feedback); committed with the round.
    """

    seed: int
    round: int
    client: str
    memory: MutableMapping[str, NDArray[Any]] = field(default_factory=dict)

    def rng(self, stage: str) -> np.random.Generator:
        """This client's stream for this round: the same on client and server, so no source of privacy."""
        return stream(self.seed, "stages", stage, self.client, self.round)


class Stage(Protocol):
    """A pair of hooks. Both return a new update; neither changes its argument."""

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Run on the client before the update leaves."""
        ...

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Undo the representation on the server, before the update is folded in.

        Raises:
            UpdateError: the update breaks what the client's hook promises.
        """
        ...


def on_client(stages: Sequence[Stage], update: Update, context: StageContext) -> Update:
    """All client hooks, in the order of the run file."""
    for stage in stages:
        update = stage.on_client(update, context)
    return update


def on_server(stages: Sequence[Stage], update: Update, context: StageContext) -> Update:
    """All server hooks, in reverse order."""
    for stage in reversed(stages):
        update = stage.on_server(update, context)
    return update
