"""Positions of the non-zeros as a bit mask, coded by the ANS coder of the optional `constriction` package.

`constriction` promises that a model, once in its fixed point, is inverted exactly; it makes no promise that
two releases or two processors turn the same floating-point probability into the same fixed point, and its
defaults for that step have changed between releases. The probability handed over here is therefore an integer
multiple of 2^-24 (exact in float64), which leaves only exact scaling; what remains is trust in the release,
so both ends should pin it. The mask has one symbol per entry, so time does not fall with the density.
"""

import importlib
from types import ModuleType

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import Int32Array
from fedpeft.errors import MissingExtraError, UpdateError

_UNITS = 1 << 24


class ConstrictionCoder:
    """Third-party ANS over the mask: at the entropy bound, slower than the gap coder."""

    def encode(self, indices: Int32Array, size: int) -> bytes:
        """Bytes for strictly ascending `indices` (int32) below `size`; none when all or no entries are held.

        Raises:
            MissingExtraError: `constriction` is not installed.
        """
        count = indices.size
        if count in (0, size):
            return b""
        stream = _stream()
        mask = np.zeros(size, dtype=np.int32)
        mask[indices] = 1
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(mask, stream.model.Bernoulli(_probability(count, size), perfect=False))
        words: npt.NDArray[np.uint32] = coder.get_compressed()
        return words.astype("<u4").tobytes()

    def decode(self, data: memoryview, count: int, size: int) -> Int32Array:
        """Inverse of `encode`, for the declared `count` <= `size`.

        Raises:
            UpdateError: `data` does not fit.
            MissingExtraError: `constriction` is not installed.
        """
        if count in (0, size):
            if len(data):
                raise UpdateError(
                    f"{len(data)} position bytes came where all or no entries are held: none is needed"
                )
            return np.arange(count, dtype=np.int32)
        if not len(data) or len(data) % 4:
            raise UpdateError(f"{len(data)} position bytes: a positive multiple of 4 is needed")
        words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
        if words[-1] == 0:
            raise UpdateError("position bytes end in a zero word: truncated or corrupt")
        stream = _stream()
        coder = stream.stack.AnsCoder(words)
        mask = coder.decode(stream.model.Bernoulli(_probability(count, size), perfect=False), size)
        positions = np.flatnonzero(mask).astype(np.int32)
        if positions.size != count or not coder.is_empty():
            raise UpdateError(
                f"position bytes do not decode to {count} of {size} entries: truncated or corrupt"
            )
        return positions


def _probability(count: int, size: int) -> float:
    units = (count * _UNITS + size // 2) // size
    return min(_UNITS - 1, max(1, units)) / _UNITS


def _stream() -> ModuleType:
    try:
        importlib.import_module("constriction")
        stream: ModuleType = importlib.import_module("constriction").stream
    except ImportError as missing:
        raise MissingExtraError(
            "the position coder 'constriction' needs the package constriction: pip install constriction, "
            "or take the coder 'rans'"
        ) from missing
    return stream
