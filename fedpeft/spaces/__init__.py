"""How a client's local change is expressed as named arrays, and how aggregated arrays change the model."""

from fedpeft.spaces.base import Memory, Route, ServerSpace, Space, Trail
from fedpeft.spaces.table import SPACES, build_space, space_options, space_traits

__all__ = [
    "SPACES",
    "Memory",
    "Route",
    "ServerSpace",
    "Space",
    "Trail",
    "build_space",
    "space_options",
    "space_traits",
]
