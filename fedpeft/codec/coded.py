"""Coded tensors: one self-contained run of bytes per tensor, and back.

Layout: format version, kind (one byte each), number of dimensions and sides (varints), the kind's body, and
CRC-32 of all of it (uint32); little-endian. The checksum finds accidents; authenticity is the signature's
task around it. Reading is bounded: a shape is compared with what the caller expects before anything of that
size is allocated, and declared counts with the bytes that came.
"""

import struct
import zlib
from collections.abc import Callable

import numpy as np

from fedpeft.codec.arrays import MAX_DIMENSIONS, Int8Array, Int32Array, Shape, Uint8Array, element_count
from fedpeft.codec.cursor import Cursor, varint
from fedpeft.codec.masks import BernoulliMask, PublicMask, PublicSource, RandomKMask
from fedpeft.codec.position_coders import CODER_BYTES, DEFAULT_CODER, coder_named, coder_of_byte
from fedpeft.codec.quantise import pack_codes, unpack_codes
from fedpeft.codec.tensors import (
    DenseTensor,
    Encoded,
    MaskedTensor,
    QuantisedTensor,
    SignTensor,
    SparseTensor,
    TernaryTensor,
    channel_count,
)
from fedpeft.errors import UpdateError
from fedpeft.runtime.jit import compile_function

FORMAT_VERSION = 1
_NO_AXIS = 255
_RANDOM_K, _BERNOULLI = 1, 2


def encode(tensor: Encoded, coder: str = DEFAULT_CODER) -> bytes:
    """The bytes of one compressed tensor; `coder` names the position coder of sparse and ternary forms.

    Raises:
        UpdateError: unknown coder.
        MissingExtraError: the coder's package is not installed.
    """
    kind = _KIND_OF[type(tensor)]
    head = bytes((FORMAT_VERSION, kind)) + _shape_bytes(tensor.shape)
    unsigned = head + _body(tensor, coder)
    return unsigned + struct.pack("<I", zlib.crc32(unsigned))


def decode(data: bytes | memoryview, shape: Shape) -> Encoded:
    """Inverse of `encode` for a tensor whose shape the receiver knows.

    Raises:
        UpdateError: another shape, version or kind; truncated, garbled or trailing bytes; values out of
            bounds. MissingExtraError: the bytes name a coder whose package is not installed.
    """
    cursor, kind, declared = _open(data)
    if declared != shape:
        raise UpdateError(f"a coded tensor of shape {declared} came: this run expects {shape}")
    return _finish(cursor, kind, shape)


def decode_up_to(data: bytes | memoryview, max_elements: int) -> Encoded:
    """`decode` for a reader that only knows a bound on the number of elements. Raises as `decode`."""
    cursor, kind, shape = _open(data)
    if element_count(shape) > max_elements:
        raise UpdateError(
            f"a coded tensor of shape {shape} came: at most {max_elements} elements are accepted"
        )
    return _finish(cursor, kind, shape)


def _open(data: bytes | memoryview) -> tuple[Cursor, int, Shape]:
    view = memoryview(data).cast("B")
    if len(view) < 7:
        raise UpdateError(f"a coded tensor of {len(view)} bytes: truncated")
    if struct.unpack("<I", view[-4:])[0] != zlib.crc32(view[:-4]):
        raise UpdateError(
            "a coded tensor's checksum does not match its bytes: truncated or corrupt, send it again"
        )
    cursor = Cursor(view[:-4])
    version = cursor.byte()
    if version != FORMAT_VERSION:
        raise UpdateError(
            f"a coded tensor of format {version}: this release reads {FORMAT_VERSION}, upgrade one side"
        )
    kind = cursor.byte()
    if kind not in _READERS:
        raise UpdateError(f"a coded tensor of kind {kind}: this release knows {sorted(_READERS)}")
    dimensions = cursor.byte()
    if dimensions > MAX_DIMENSIONS:
        raise UpdateError(
            f"a coded tensor with {dimensions} dimensions: at most {MAX_DIMENSIONS} are accepted"
        )
    return cursor, kind, tuple(cursor.varint() for _ in range(dimensions))


def _finish(cursor: Cursor, kind: int, shape: Shape) -> Encoded:
    tensor = _READERS[kind](cursor, shape)
    cursor.finish()
    return tensor


def _shape_bytes(shape: Shape) -> bytes:
    return bytes((len(shape),)) + b"".join(varint(side) for side in shape)


def _body(tensor: Encoded, coder: str) -> bytes:
    match tensor:
        case DenseTensor():
            return tensor.values.astype("<f4").tobytes()
        case SparseTensor():
            positions = coder_named(coder).encode(tensor.indices, element_count(tensor.shape))
            return _coder_head(coder, tensor.indices.size) + tensor.values.astype("<f4").tobytes() + positions
        case TernaryTensor():
            return _ternary_body(tensor, coder)
        case QuantisedTensor():
            axis = _NO_AXIS if tensor.channel_axis is None else tensor.channel_axis
            scales = tensor.scales.astype("<f4").tobytes()
            return bytes((tensor.bits, axis)) + scales + pack_codes(tensor.codes, tensor.bits)
        case SignTensor():
            return struct.pack("<f", tensor.scale) + tensor.packed.tobytes()
        case MaskedTensor():
            count = varint(tensor.values.size)
            return (
                _mask_bytes(tensor.mask)
                + struct.pack("<f", tensor.gain)
                + count
                + tensor.values.astype("<f4").tobytes()
            )


def _ternary_body(tensor: TernaryTensor, coder: str) -> bytes:
    flat = tensor.trits.reshape(-1)
    indices = _non_zeros(flat)
    packed = np.zeros((indices.size + 7) // 8, dtype=np.uint8)
    _pack_signs(flat, indices, packed)
    positions = coder_named(coder).encode(indices, flat.size)
    return _coder_head(coder, indices.size) + struct.pack("<f", tensor.scale) + packed.tobytes() + positions


def _coder_head(coder: str, count: int) -> bytes:
    return bytes((CODER_BYTES[coder],)) + varint(count)


def _mask_bytes(mask: PublicMask) -> bytes:
    source = struct.pack("<QQQ", mask.source.seed, mask.source.round, mask.source.tensor)
    match mask:
        case RandomKMask():
            return bytes((_RANDOM_K,)) + source + mask.count.to_bytes(9, "little")
        case BernoulliMask():
            return bytes((_BERNOULLI,)) + source + mask.keep_threshold.to_bytes(9, "little")


def _read_dense(cursor: Cursor, shape: Shape) -> Encoded:
    return DenseTensor(cursor.floats(element_count(shape)).reshape(shape))


def _read_sparse(cursor: Cursor, shape: Shape) -> Encoded:
    coder = coder_of_byte(cursor.byte())
    size = element_count(shape)
    count = _count_bytes_of(cursor, size)
    values = cursor.floats(count)
    return SparseTensor(shape, coder.decode(cursor.rest(), count, size), values)


def _read_ternary(cursor: Cursor, shape: Shape) -> Encoded:
    coder = coder_of_byte(cursor.byte())
    size = element_count(shape)
    count = _count_bytes_of(cursor, size)
    scale = cursor.float32()
    packed = np.frombuffer(cursor.take((count + 7) // 8), dtype=np.uint8)
    if count % 8 and int(packed[-1]) >> (count % 8):
        raise UpdateError("coded ternary tensor: bits after the last sign must be zero")
    indices = coder.decode(cursor.rest(), count, size)
    trits = np.zeros(size, dtype=np.int8)
    _place_signs(indices, np.array(packed), trits)
    return TernaryTensor(trits.reshape(shape), scale)


def _read_quantised(cursor: Cursor, shape: Shape) -> Encoded:
    bits, axis_byte = cursor.byte(), cursor.byte()
    if bits not in (2, 4, 8):
        raise UpdateError(f"coded tensor quantised to {bits} bits: 2, 4 or 8 are known")
    axis = None if axis_byte == _NO_AXIS else axis_byte
    scales = cursor.floats(channel_count(shape, axis))
    codes = unpack_codes(cursor.rest(), bits, element_count(shape))
    return QuantisedTensor(codes.reshape(shape), scales, bits, axis)


def _read_sign(cursor: Cursor, shape: Shape) -> Encoded:
    scale = cursor.float32()
    packed = np.frombuffer(cursor.take((element_count(shape) + 7) // 8), dtype=np.uint8)
    return SignTensor(shape, packed, scale)


def _read_masked(cursor: Cursor, shape: Shape) -> Encoded:
    kind = cursor.byte()
    source = PublicSource(cursor.read_unsigned(8), cursor.read_unsigned(8), cursor.read_unsigned(8))
    parameter = cursor.read_unsigned(9)
    if kind not in (_RANDOM_K, _BERNOULLI):
        raise UpdateError(f"coded masked tensor: mask kind {kind} is unknown")
    mask: PublicMask = (
        RandomKMask(source, parameter) if kind == _RANDOM_K else BernoulliMask(source, parameter)
    )
    gain = cursor.float32()
    return MaskedTensor(shape, mask, cursor.floats(_count_bytes_of(cursor, element_count(shape))), gain)


def _count_bytes_of(cursor: Cursor, size: int) -> int:
    count = cursor.varint()
    if count > size:
        raise UpdateError(f"a coded tensor declares {count} held entries of {size}: corrupt")
    return count


_KIND_OF: dict[type[Encoded], int] = {
    DenseTensor: 1,
    SparseTensor: 2,
    TernaryTensor: 3,
    QuantisedTensor: 4,
    SignTensor: 5,
    MaskedTensor: 6,
}
_READERS: dict[int, Callable[[Cursor, Shape], Encoded]] = {
    1: _read_dense,
    2: _read_sparse,
    3: _read_ternary,
    4: _read_quantised,
    5: _read_sign,
    6: _read_masked,
}


def _non_zeros(flat: Int8Array) -> Int32Array:
    found = np.empty(flat.size + 1, dtype=np.int32)
    return found[: _gather_non_zeros(flat, found)].copy()


@compile_function
def _gather_non_zeros(flat: Int8Array, found: Int32Array) -> int:
    filled = 0
    for i in range(flat.size):
        # Written always, kept by the step: no branch to mispredict.
        found[filled] = i
        filled += flat[i] != 0
    return filled


@compile_function
def _place_signs(indices: Int32Array, packed: Uint8Array, trits: Int8Array) -> None:
    for i in range(indices.size):
        negative = (packed[i >> 3] >> (i & 7)) & 1
        trits[indices[i]] = 1 - 2 * np.int8(negative)


@compile_function
def _pack_signs(flat: Int8Array, indices: Int32Array, packed: Uint8Array) -> None:
    for i in range(indices.size):
        # The top bit of a negative int8.
        packed[i >> 3] |= np.uint8(np.uint8(flat[indices[i]]) >> 7) << (i & 7)
