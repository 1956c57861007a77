"""One bit per entry: the sign, times the mean magnitude."""

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import finite_float32
from fedpeft.codec.tensors import SignTensor


def sign_with_scale(delta: npt.NDArray[np.floating]) -> SignTensor:
    """Signs of all entries and the scale ||delta||_1 / d, which is the least-squares one.

    Source: Karimireddy, Rebjock, Stich and Jaggi (2019), "Error Feedback Fixes SignSGD", where the compressor
    is delta -> (||delta||_1 / d) sign(delta). Zeros of either sign count as positive; made for error
    feedback.

    Raises:
        UpdateError: not float32, or not finite.
    """
    flat = finite_float32(delta)
    scale = float(np.abs(flat).mean(dtype=np.float64)) if flat.size else 0.0
    return SignTensor(delta.shape, np.packbits(flat < 0, bitorder="little"), scale)
