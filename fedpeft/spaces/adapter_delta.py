"""The plain space: an update is the difference of the trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import Section
from fedpeft.models.trainable import get_arrays, set_arrays
from fedpeft.update import Arrays, Layout, frozen_arrays


class AdapterDelta(Section):
    """State: every trainable parameter. Update: parameter after training minus the state. Both float32.

    Deltas rather than parameters travel, because clipping, noise and compression act on what a client
    learned, and not on where the model stood.
    """

    kind: ClassVar[str] = "adapter-delta"

    def initial_state(self, model: nn.Module) -> Arrays:
        """Copies of the trainable parameters."""
        return frozen_arrays(get_arrays(model))

    def enter(self, model: nn.Module, state: Arrays) -> None:
        """Copy the state into the trainable parameters."""
        set_arrays(model, state)

    def express(self, model: nn.Module, state: Arrays) -> Arrays:
        """Parameter minus state, one float32 rounding per entry."""
        return {name: array - state[name] for name, array in get_arrays(model).items()}

    def update_layout(self, state: Layout) -> Layout:
        """The state's own layout."""
        return state

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """State plus change, added in float64 and rounded once to float32."""
        return frozen_arrays(
            {
                name: (array.astype(np.float64) + change[name]).astype(np.float32)
                for name, array in state.items()
            }
        )
