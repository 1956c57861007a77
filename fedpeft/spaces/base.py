"""The seam: what a space must say.

This module and those of the spaces' options stand on NumPy alone: whoever only counts updates needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import RunConfig
from fedpeft.config.traits import Traits
from fedpeft.updates.update import Arrays, Layout

if TYPE_CHECKING:
    from torch import nn

Parameters: TypeAlias = "Mapping[str, nn.Parameter]"
"""A model's trainable parameters by canonical name, sorted."""


Memory = MutableMapping[str, NDArray[Any]]
"""Arrays that one client keeps from round to round."""


@dataclass(frozen=True)
class Route:
    """Which directions a zeroth-order client visits in a round, and in which unit it moves along them.

    Attributes:
        directions: int64 [visits], indices of directions in the order of the visits.
        exponent: log2 of the quantum that every move is a multiple of; None: moves are plain float32.
        largest: the most quanta that one visit may move.
    """

    directions: NDArray[np.int64]
    exponent: int | None
    largest: int


@dataclass(frozen=True)
class Trail:
    """What a zeroth-order client did on its route.

    Attributes:
        directions: int64 [visits].
        amounts: int64 [visits], the quanta by which each visit moved the parameters; all zero without one.
    """

    directions: NDArray[np.int64]
    amounts: NDArray[np.int64]


class ServerSpace(Protocol):
    """What those who count updates need of a space; no part of it looks at a model.

    The *state* is what the server keeps and broadcasts, as named arrays; an *update* is what one client
    sends. The server aggregates updates and need not know what they mean; only `apply` does.
    """

    @property
    def kind(self) -> str:
        """Name in the run file."""
        ...

    def update_layout(self, state: Layout) -> Layout:
        """Names, shapes and dtypes of an update, given those of the state."""
        ...

    def sum_layout(self, state: Layout) -> Layout:
        """Names, shapes and dtypes of an update as it is summed; see `placed`."""
        ...

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """An update as it is summed with others, which may have started from other states.

        Args:
            age: rounds that ended since the state it started from; 0 in synchronous rounds.
        """
        ...

    def check(self, arrays: Arrays, *, state: Arrays, who: str) -> None:
        """Refuse an update whose values no honest client can send, or that alone would lead out of range.

        Args:
            state: what the update starts from. Where a mean of updates is applied to it, none of which was
                refused, `apply` raises nothing.

        Raises:
            UpdateError: naming `who` sent it.
        """
        ...

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """The next state: `state` moved by an aggregated change (float64), rounded once.

        The change is laid out as updates are, or as sums of updates are.

        Raises:
            UpdateError: the state would leave its range.
        """
        ...


class Space(ServerSpace, Protocol):
    """A way to express changes of a model's trainable parameters."""

    def facts(self) -> Mapping[str, str]:
        """What a person should know of it before a run: name to value, both short."""
        ...

    def example(self, state: Arrays, visits: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        """A state half-way through a run and an update, drawn at random: their sizes are what messages take.

        Args:
            state: the initial one.
            visits: directions that a zeroth-order client visits in a round.
        """
        ...

    def example_step(
        self, state: Arrays, updates: Sequence[Arrays], rng: np.random.Generator
    ) -> Arrays | None:
        """What a round with these updates would change in a state; None where states always travel whole."""
        ...

    def replay_s(self) -> float | None:
        """Seconds that one thread here would take from theta_0 to the weights of a run's last state.

        Worked out from the time of a small part; None where nothing is rebuilt.
        """
        ...

    def initial_state(self, parameters: Parameters) -> Arrays:
        """The state that a run starts from; `parameters` are as the model was loaded."""
        ...

    def enter(self, parameters: Parameters, state: Arrays) -> None:
        """Put the parameters where `state` says.

        Raises:
            ModelError: the state doesn't fit the model.
        """
        ...

    def route(self, state: Arrays, visits: int, rng: np.random.Generator) -> Route:
        """The directions that a zeroth-order client visits from `state`."""
        ...

    def express(
        self,
        parameters: Parameters,
        state: Arrays,
        trail: Trail | None = None,
        memory: Memory | None = None,
    ) -> Arrays:
        """The change from `state` to where local training has left the parameters.

        Args:
            memory: arrays that the client keeps from round to round, by name; replaced in place. None: it
                keeps nothing.
            trail: how a zeroth-order trainer got there; None from other trainers.
        """
        ...


class SpaceOptions(Protocol):
    """A space as the run file describes it, before there is a model.

    Attributes:
        declares: what it is whatever its options.
    """

    declares: ClassVar[Traits]

    @property
    def kind(self) -> str:
        """Name in the run file."""
        ...

    @property
    def traits(self) -> Traits:
        """What it is with its options; see `fedpeft.config.traits`."""
        ...

    def open(self, run: RunConfig, model: nn.Module) -> Space:
        """The space over the trainable parameters of `model`, which is as it was loaded."""
        ...
