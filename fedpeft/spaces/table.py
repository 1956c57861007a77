"""The spaces by name."""

from __future__ import annotations

from typing import Any

from fedpeft.config import SpaceSection
from fedpeft.options import build_option
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.spaces.base import Space

SPACES: dict[str, Any] = {  # a class that is a Space and takes its options by name
    "adapter-delta": AdapterDelta,
}


def build_space(section: SpaceSection) -> Space:
    """The space a run file asks for.

    Raises:
        RunFileError: an unknown name or option.
    """
    space: Space = build_option("space", SPACES, section.kind, section.options)
    return space
