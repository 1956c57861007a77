"""The seam: what a space must say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.update import Arrays, Layout


class Space(Protocol):
    """A way to express changes of a model's trainable parameters.

    The *state* is what the server keeps and broadcasts, as named arrays; an *update* is what one client
    sends. The server aggregates updates and need not know what they mean; only `apply` does.
    """

    @property
    def kind(self) -> str:
        """Name in the run file."""
        ...

    def initial_state(self, model: nn.Module) -> Arrays:
        """The state that stands for the model as it is now."""
        ...

    def enter(self, model: nn.Module, state: Arrays) -> None:
        """Put the model's trainable parameters where `state` says.

        Raises:
            ModelError: the state doesn't fit the model.
        """
        ...

    def express(self, model: nn.Module, state: Arrays) -> Arrays:
        """The change from `state` to where local training has left the model."""
        ...

    def update_layout(self, state: Layout) -> Layout:
        """Names, shapes and dtypes of an update, given those of the state."""
        ...

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """The next state: `state` moved by an aggregated change (float64), rounded once."""
        ...
