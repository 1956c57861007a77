"""The spaces by name."""

from __future__ import annotations

from fedpeft.config import SpaceSection
from fedpeft.options import build_option
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.spaces.base import Space

SPACES = {
    "adapter-delta": AdapterDelta,
}


def build_space(section: SpaceSection) -> Space:
    """The space a run file asks for.

    Raises:
        RunFileError: an unknown name or option.
    """
    return build_option("space", SPACES, section.kind, section.options)
