"""Which coordinates a direction moves, where it doesn't move all: there it is 0 instead of +1 or -1.

What is out of support is the same for everybody, so replay stays a sum of integers times directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Support(Protocol):
    """The coordinates that may move, tensor by tensor."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what depends on values of weights; empty where names alone decide."""

    def moves(self, tensor_id: int, directions: torch.Tensor) -> torch.Tensor:
        """Bool [K]: which of int64 [K] directions move anything in the tensor."""

    def mask(self, tensor_id: int) -> torch.Tensor | None:
        """Bool [size], row-major: what may move in the tensor along the directions that do; None: all."""
