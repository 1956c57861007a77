"""The position coders by name, and by the byte that names them in coded tensors."""

from typing import Protocol

from fedpeft.codec.arrays import Int32Array
from fedpeft.codec.constriction_ans import ConstrictionCoder
from fedpeft.codec.golomb import GolombCoder
from fedpeft.codec.rans import RansCoder
from fedpeft.errors import UpdateError


class PositionCoder(Protocol):
    """Turns strictly ascending positions into bytes and back; the count travels beside the bytes."""

    def encode(self, indices: Int32Array, size: int) -> bytes:
        """Bytes for `indices`, int32, each below `size`."""
        ...

    def decode(self, data: memoryview, count: int, size: int) -> Int32Array:
        """Exactly `count` ascending positions below `size`. Raises UpdateError when `data` does not fit."""
        ...


CODERS: dict[str, PositionCoder] = {
    "rans": RansCoder(),
    "golomb": GolombCoder(),
    "constriction": ConstrictionCoder(),
}
CODER_BYTES: dict[str, int] = {"rans": 1, "golomb": 2, "constriction": 3}
DEFAULT_CODER = "rans"
"""In `simulations/bench_codec.py` the fastest there and back, and within 0.04% of the smallest."""


def coder_named(name: str) -> PositionCoder:
    """The coder of that name. Raises UpdateError for an unknown one."""
    if name not in CODERS:
        raise UpdateError(f"position coder {name!r}: choose one of {', '.join(CODERS)}")
    return CODERS[name]


def coder_of_byte(byte: int) -> PositionCoder:
    """The coder that a coded tensor names. Raises UpdateError for an unknown byte."""
    for name, known in CODER_BYTES.items():
        if known == byte:
            return CODERS[name]
    raise UpdateError(
        f"a coded tensor names position coder {byte}: this release knows {sorted(CODER_BYTES.values())}"
    )
