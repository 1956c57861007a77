"""The seam: what a space must say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.update import Arrays, Layout

Parameters = Mapping[str, nn.Parameter]
"""A model's trainable parameters by canonical name, sorted."""


class Space(Protocol):
    """A way to express changes of a model's trainable parameters.

    The *state* is what the server keeps and broadcasts, as named arrays; an *update* is what one client
    sends. The server aggregates updates and need not know what they mean; only `apply` does.
    """

    @property
    def kind(self) -> str:
        """Name in the run file."""
        ...

    def initial_state(self, parameters: Parameters) -> Arrays:
        """The state that stands for the parameters as they are now."""
        ...

    def enter(self, parameters: Parameters, state: Arrays) -> None:
        """Put the parameters where `state` says.

        Raises:
            ModelError: the state doesn't fit the model.
        """
        ...

    def express(self, parameters: Parameters, state: Arrays) -> Arrays:
        """The change from `state` to where local training has left the parameters."""
        ...

    def update_layout(self, state: Layout) -> Layout:
        """Names, shapes and dtypes of an update, given those of the state."""
        ...

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """The next state: `state` moved by an aggregated change (float64), rounded once."""
        ...
