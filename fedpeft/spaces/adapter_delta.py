"""The plain space: an update is the difference of the trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import Section
from fedpeft.models.trainable import host_array, read_parameters, write_parameters
from fedpeft.spaces.base import Parameters
from fedpeft.update import Arrays, Layout, frozen_arrays


class AdapterDelta(Section):
    """State: every trainable parameter. Update: parameter after training minus the state. Both float32.

    Deltas rather than parameters travel, because clipping, noise and compression act on what a client
    learned, and not on where the model stood.
    """

    kind: ClassVar[str] = "adapter-delta"

    def initial_state(self, parameters: Parameters) -> Arrays:
        """Copies of the trainable parameters."""
        return frozen_arrays(read_parameters(parameters))

    def enter(self, parameters: Parameters, state: Arrays) -> None:
        """Copy the state into the trainable parameters."""
        write_parameters(parameters, state)

    def express(self, parameters: Parameters, state: Arrays) -> Arrays:
        """Parameter minus state, one float32 rounding per entry."""
        return {name: host_array(parameter) - state[name] for name, parameter in parameters.items()}

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
