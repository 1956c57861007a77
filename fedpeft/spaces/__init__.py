"""How a client's local change is expressed as named arrays, and how aggregated arrays change the model."""

from fedpeft.spaces.base import Space
from fedpeft.spaces.table import SPACES, build_space

__all__ = ["SPACES", "Space", "build_space"]
