"""Unbiased stochastic rounding to int8, int4 or int2 with one scale per channel, and bit packing."""

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import Float32Array, Int8Array, Shape, Uint8Array, finite_float32
from fedpeft.codec.tensors import QuantisedTensor, along_axis, channel_count
from fedpeft.errors import UpdateError


def default_channel_axis(shape: Shape) -> int | None:
    """The shorter axis of a matrix (the rank of a LoRA factor); None below two dimensions.

    Scales then cost 32 / (longer side) bits per entry; along the other axis a rank-8 factor would pay 4 bits.
    Tensors of more dimensions take their first axis.
    """
    if len(shape) < 2:
        return None
    return 1 if len(shape) == 2 and shape[1] < shape[0] else 0


def quantise(
    delta: npt.NDArray[np.floating], bits: int, rng: np.random.Generator, channel_axis: int | None
) -> QuantisedTensor:
    """Round each entry to one of its two neighbouring multiples of the channel's scale, right on average.

    With L = 2^(bits-1) - 1 levels on each side of zero and scale = max|channel| / L, x becomes
    scale x (floor(x / scale) + Bernoulli(frac(x / scale))). int2 is {-1, 0, 1} x max.

    Source: Alistarh, Grubic, Li, Tomioka and Vojnovic (2017), "QSGD", section 3.1, with the maximum per
    channel in place of the norm. The bias is at most 2^-24 of a scale: uniforms and quotients are float32.

    Args:
        delta: float32, any shape.
        bits: 2, 4 or 8.
        rng: the client's own stream; it need not be shared.
        channel_axis: axis with one scale per index, or None for one scale (see `default_channel_axis`).

    Raises:
        UpdateError: not float32, not finite, another width, or no such axis.
    """
    if bits not in (2, 4, 8):
        raise UpdateError(f"quantisation to {bits} bits: 2, 4 or 8 are supported")
    array = finite_float32(delta).reshape(delta.shape)
    channel_count(delta.shape, channel_axis)
    largest = 2 ** (bits - 1) - 1
    scales = _scales(array, largest, channel_axis)
    divisor = along_axis(np.where(scales > 0, scales, np.float32(1)), array.ndim, channel_axis)
    ratio = np.divide(array, divisor, dtype=np.float32)
    floor = np.floor(ratio)
    up = rng.random(array.shape, dtype=np.float32) < ratio - floor
    codes = np.clip(floor + up, -largest, largest).astype(np.int8)
    return QuantisedTensor(codes, scales, bits, channel_axis)


def _scales(array: Float32Array, largest: int, channel_axis: int | None) -> Float32Array:
    others = tuple(axis for axis in range(array.ndim) if axis != channel_axis)
    peaks = np.abs(array).max(axis=others, initial=0.0).astype(np.float32).reshape(-1)
    scales = peaks / np.float32(largest)
    # Rounded towards the peak, so that no entry lies beyond the last level and is clipped (which would be a
    # bias).
    short = scales * np.float32(largest) < peaks
    scales[short] = np.nextafter(scales[short], np.float32(np.inf))
    return np.asarray(scales, dtype=np.float32)


def pack_codes(codes: Int8Array, bits: int) -> bytes:
    """Two's complement codes, 8 / bits per byte, first entry in the lowest bits; unused bits are zero."""
    per_byte = 8 // bits
    low = codes.reshape(-1).view(np.uint8) & np.uint8(2**bits - 1)
    padded = np.zeros(-(-low.size // per_byte) * per_byte, dtype=np.uint8)
    padded[: low.size] = low
    packed = np.zeros(padded.size // per_byte, dtype=np.uint8)
    for lane in range(per_byte):
        packed |= padded[lane::per_byte] << np.uint8(lane * bits)
    return packed.tobytes()


def unpack_codes(packed: bytes | memoryview, bits: int, count: int) -> Int8Array:
    """Inverse of `pack_codes`, flat int8. Raises UpdateError when length or unused bits do not fit."""
    per_byte = 8 // bits
    if len(packed) != -(-count // per_byte):
        raise UpdateError(
            f"{len(packed)} bytes of int{bits} codes: {-(-count // per_byte)} are needed for {count}"
        )
    raw: Uint8Array = np.frombuffer(packed, dtype=np.uint8)
    spread = np.empty(raw.size * per_byte, dtype=np.uint8)
    top = np.uint8(8 - bits)
    for lane in range(per_byte):
        spread[lane::per_byte] = raw << np.uint8(8 - bits - lane * bits)
    # The arithmetic shift of the signed view extends the sign.
    signed = spread.view(np.int8) >> top.view(np.int8)
    if signed[count:].any():
        raise UpdateError(f"int{bits} codes: bits after the last code must be zero")
    return signed[:count]
