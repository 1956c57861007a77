"""The plain space: an update is the difference of the trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.aggregation.exact_sum import add_change
from fedpeft.config.sections import RunConfig, Section
from fedpeft.config.traits import Trait, Traits
from fedpeft.seedspace.layout import MAX_DIRECTION
from fedpeft.spaces.base import Memory, Parameters, Route, Trail
from fedpeft.updates.packed import PackedArrays, pack, packing_of
from fedpeft.updates.update import Arrays, Layout, freeze_arrays, layout_of

if TYPE_CHECKING:
    from torch import nn


class AdapterDelta(Section):
    """State: every trainable parameter. Update: parameter after training minus the state. Both float32.

    Deltas rather than parameters travel, because clipping, noise and compression act on what a client
    learned, and not on where the model stood.
    """

    kind: ClassVar[str] = "adapter-delta"
    declares: ClassVar[Traits] = frozenset({Trait.SENDS_ENTRIES})

    @property
    def traits(self) -> Traits:
        """The same whatever its options."""
        return self.declares

    def open(self, run: RunConfig, model: nn.Module) -> AdapterDelta:
        """Itself: it keeps nothing of the model."""
        return self

    def facts(self) -> Mapping[str, str]:
        """Nothing beyond the parameters themselves."""
        return {}

    def example(self, state: Arrays, visits: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        """The state itself, and normal entries of standard deviation 1e-3."""
        drawn = {
            name: np.float32(1e-3) * rng.standard_normal(array.shape, dtype=np.float32)
            for name, array in state.items()
        }
        return state, drawn

    def example_step(self, state: Arrays, updates: Sequence[Arrays], rng: np.random.Generator) -> None:
        """A step would be as large as the state."""

    def replay_s(self) -> None:
        """The state is the weights."""

    def initial_state(self, parameters: Parameters) -> Arrays:
        """Copies of the trainable parameters."""
        from fedpeft.models.trainable import read_parameters  # with a model, as it brings torch

        return freeze_arrays(read_parameters(parameters))

    def enter(self, parameters: Parameters, state: Arrays) -> None:
        """Copy the state into the trainable parameters."""
        from fedpeft.models.trainable import write_parameters  # as above

        write_parameters(parameters, state)

    def route(self, state: Arrays, visits: int, rng: np.random.Generator) -> Route:
        """A fresh direction for every visit: nothing has to be replayed from it."""
        directions = rng.integers(0, MAX_DIRECTION, size=visits, endpoint=True, dtype=np.int64)
        return Route(directions, exponent=None, largest=0)

    def express(
        self,
        parameters: Parameters,
        state: Arrays,
        trail: Trail | None = None,
        memory: Memory | None = None,
    ) -> Arrays:
        """Parameter minus state, one float32 rounding per entry, however the trainer got there."""
        from fedpeft.models.trainable import changes  # as above

        return changes(parameters, state)

    def update_layout(self, state: Layout) -> Layout:
        """The state's own layout."""
        return state

    def sum_layout(self, state: Layout) -> Layout:
        """That of an update."""
        return self.update_layout(state)

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """Itself: a change is added wherever the model has got to."""
        return arrays

    def check(self, arrays: Arrays, *, state: Arrays, who: str) -> None:
        """Nothing: any finite change is possible, and the exact sum refuses what is not finite."""

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """State plus change, added in float64 and rounded once to float32."""
        packing = packing_of(layout_of(state)).like("<f4")
        start, by = pack(state, packing).flat, pack(change, packing.like("<f8")).flat
        return PackedArrays(add_change(start, by), packing)
