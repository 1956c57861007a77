"""How a client's local change is expressed as named arrays, and how aggregated arrays change the model."""

from fedpeft.spaces.base import Memory, Route, Space, Trail
from fedpeft.spaces.directions import direction_stream
from fedpeft.spaces.table import SPACES, build_space, space_options

__all__ = ["SPACES", "Memory", "Route", "Space", "Trail", "build_space", "direction_stream", "space_options"]
