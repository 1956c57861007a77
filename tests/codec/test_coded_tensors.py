"""Coded tensors: exact round trips of every form, and refusal of everything else."""

import struct
import tracemalloc
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft.codec import (
    DenseTensor,
    Encoded,
    FixedScale,
    PublicSource,
    QuantisedTensor,
    SignTensor,
    SparseTensor,
    StdScale,
    TernaryTensor,
    dare,
    decode,
    decode_up_to,
    default_channel_axis,
    encode,
    identical,
    quantise,
    random_k,
    sign_with_scale,
    ternarise,
    top_k,
)
from fedpeft.codec.cursor import varint
from fedpeft.errors import UpdateError
from tests.codec.strategies import deltas, densities, shapes, tied_floats, trits

SOURCE = PublicSource(seed=2**64 - 1, round=3, tensor=17)


@st.composite
def encoded_tensors(draw: st.DrawFn) -> Encoded:
    delta = draw(
        hnp.arrays("float32", shapes, elements=st.one_of(st.floats(-1e3, 1e3, width=32), tied_floats))
    )
    density = draw(densities)
    match draw(st.integers(0, 5)):
        case 0:
            return DenseTensor(delta)
        case 1:
            return top_k(delta, density)
        case 2:
            return ternarise(delta, density, FixedScale(draw(st.floats(0, 2.0**100, width=32))))
        case 3:
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            axis = draw(st.sampled_from([None, *range(delta.ndim)]))
            return quantise(delta, draw(st.sampled_from([2, 4, 8])), rng, axis)
        case 4:
            return sign_with_scale(delta)
        case _:
            return random_k(delta, density, SOURCE) if draw(st.booleans()) else dare(delta, 0.5, SOURCE)


@settings(deadline=None, max_examples=150)
@given(encoded_tensors(), st.sampled_from(["rans", "golomb"]))
def test_decoding_inverts_encoding_bit_for_bit(tensor: Encoded, coder: str) -> None:
    data = encode(tensor, coder)
    dense = tensor.dense()
    assert isinstance(dense, np.ndarray)
    assert dense.dtype == np.float32
    assert dense.shape == tensor.shape
    assert dense.flags.writeable
    assert identical(decode(data, tensor.shape), tensor)
    assert identical(decode_up_to(memoryview(bytearray(data)), max(1, dense.size)), tensor)
    assert encode(decode(data, tensor.shape), coder) == data


@settings(deadline=None)
@given(trits, st.sampled_from(["rans", "golomb"]))
def test_every_ternary_pattern_survives(pattern: npt.NDArray[np.int8], coder: str) -> None:
    back = decode(encode(TernaryTensor(pattern, 0.5), coder), pattern.shape)
    assert isinstance(back, TernaryTensor)
    assert np.array_equal(back.trits, pattern)
    assert back.scale == 0.5


@settings(deadline=None)
@given(deltas)
def test_top_k_of_everything_is_lossless(delta: npt.NDArray[np.float32]) -> None:
    assert np.array_equal(decode(encode(top_k(delta, 1.0)), delta.shape).dense(), delta)


def sample() -> TernaryTensor:
    delta = np.random.default_rng(2).standard_normal((16, 24)).astype(np.float32)
    return ternarise(delta, 0.2, StdScale())


def test_every_single_byte_change_and_every_truncation_is_refused() -> None:
    data = encode(sample())
    for at in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            with pytest.raises(UpdateError):
                decode(bytes(changed), (16, 24))
        with pytest.raises(UpdateError):
            decode(data[:at], (16, 24))
    with pytest.raises(UpdateError):
        decode(data + b"\0", (16, 24))


def resealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    "tensor",
    [
        sample(),
        top_k(np.arange(384, dtype=np.float32), 0.1),
        quantise(
            np.ones((16, 24), dtype=np.float32), 4, np.random.default_rng(0), default_channel_axis((16, 24))
        ),
        sign_with_scale(np.ones(13, dtype=np.float32)),
        random_k(np.arange(384, dtype=np.float32), 0.1, SOURCE),
        DenseTensor(np.ones((3, 2), dtype=np.float32)),
    ],
    ids=lambda tensor: type(tensor).__name__,
)
def test_forged_bytes_with_a_right_checksum_stay_within_bounds(tensor: Encoded) -> None:
    rng = np.random.default_rng(4)
    body = encode(tensor)[:-4]
    refused = 0
    for _ in range(1500):
        forged = bytearray(body)
        for _ in range(int(rng.integers(1, 4))):
            forged[int(rng.integers(len(forged)))] = int(rng.integers(256))
        try:
            read = decode(resealed(bytes(forged)), tensor.shape)
            dense = read.dense()
        except UpdateError:
            refused += 1
            continue
        assert dense.shape == tensor.shape
        assert np.isfinite(dense).all()
    assert refused > 50


def test_a_declared_size_allocates_nothing() -> None:
    # Shape 2^30 x 1 and count 2^30 are declared by a message of a few bytes.
    huge = (
        bytes((1, 3, 2))
        + b"\x80\x80\x80\x80\x04"
        + b"\x01"
        + bytes((1,))
        + b"\x80\x80\x80\x80\x04"
        + bytes(8)
    )
    tracemalloc.start()
    with pytest.raises(UpdateError, match="are declared"):
        decode(resealed(huge), (2**30, 1))
    with pytest.raises(UpdateError, match="are declared"):
        decode_up_to(resealed(huge), 2**31 - 1)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    with pytest.raises(UpdateError, match="expects"):
        decode(resealed(huge), (16, 24))
    with pytest.raises(UpdateError, match="at most 1000 elements"):
        decode_up_to(resealed(huge), 1000)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bytes((2, 3, 0)), "format 2"),
        (bytes((1, 9, 0)), "kind 9"),
        (bytes((1, 3, 9)) + b"\x01" * 9, "9 dimensions"),
        (bytes((1, 3, 1)) + b"\x81\x00", "shortest form"),
        (bytes((1, 3, 1)) + b"\x05" + bytes((7, 0)), "coder 7"),
        (bytes((1, 3, 1)) + b"\x05" + bytes((1, 6)) + bytes(9), "6 held entries of 5"),
        (bytes((1, 4, 1)) + b"\x05" + bytes((3, 255)), "3 bits"),
        (bytes((1, 4, 1)) + b"\x05" + bytes((8, 1)), "channel axis 1"),
        (bytes((1, 5, 1)) + b"\x05" + struct.pack("<fB", 1.0, 0x20), "after the last sign"),
        (bytes((1, 5, 1)) + b"\x05" + struct.pack("<fB", -1.0, 0), "negative"),
        (bytes((1, 5, 1)) + b"\x05" + struct.pack("<fB", float("nan"), 0), "finite"),
        (bytes((1, 1, 1)) + b"\x01" + struct.pack("<f", float("inf")), "infinity"),
        (bytes((1, 1, 1)) + b"\x01" + struct.pack("<fB", 1.0, 0), "follow its end"),
        (bytes((1, 6, 0)) + bytes((3,)) + bytes(38), "mask kind 3"),
    ],
)
def test_each_refusal_says_what_is_wrong(body: bytes, message: str) -> None:
    shape = (5,) if body[3:4] == b"\x05" else (1,)
    with pytest.raises(UpdateError, match=message):
        decode_up_to(resealed(body), 5) if len(body) < 4 or body[2] == 0 else decode(resealed(body), shape)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparseTensor((4,), np.array([1, 1], np.int32), np.ones(2, np.float32)), "ascend"),
        (lambda: SparseTensor((4,), np.array([4], np.int32), np.ones(1, np.float32)), "ascend"),
        (lambda: SparseTensor((4,), np.array([-1], np.int32), np.ones(1, np.float32)), "ascend"),
        (lambda: SparseTensor((4,), np.array([1], np.int32), np.ones(2, np.float32)), "one per index"),
        (lambda: SparseTensor((4,), np.array([1], np.int32), np.array([np.nan], np.float32)), "NaN"),
        (lambda: QuantisedTensor(np.array([8], np.int8), np.ones(1, np.float32), 4, None), "at most 7"),
        (lambda: QuantisedTensor(np.array([-8], np.int8), np.ones(1, np.float32), 4, None), "at most 7"),
        (lambda: QuantisedTensor(np.ones((2, 3), np.int8), np.ones(2, np.float32), 4, 1), "3 channels"),
        (
            lambda: QuantisedTensor(np.ones(1, np.int8), np.array([1e38], np.float32), 4, None),
            r"reach 7e\+38",
        ),
        (lambda: dare(np.full(64, 3e38, np.float32), 0.5, SOURCE), r"reach 6e\+38"),
        (lambda: SignTensor((9,), np.zeros(1, np.uint8), 1.0), "2 are needed"),
        (lambda: DenseTensor(np.array([np.inf], np.float32)), "infinity"),
    ],
)
def test_no_invalid_tensor_can_be_built(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(UpdateError, match=message):
        build()


@pytest.mark.parametrize("shape", [(0, 2**40), (0, 2**30, 2**30), (2**16, 2**16), (1,) * 9, (2**62, 2**62)])
def test_shapes_that_no_array_can_have_are_refused(shape: tuple[int, ...]) -> None:
    sides = b"".join(varint(side) for side in shape)
    for body in (
        bytes((1, 3, len(shape))) + sides + bytes((1, 0)) + bytes(4),
        bytes((1, 1, len(shape))) + sides,
    ):
        with pytest.raises(UpdateError, match=r"dimensions|elements are the most"):
            decode_up_to(resealed(body), 2**31 - 1)


def test_small_tensors_stay_small() -> None:
    # A rank-8 factor of a 384-wide layer at 5%: 129 bytes of entropy, then header, scale, state, checksum.
    delta = np.random.default_rng(0).standard_normal((8, 384)).astype(np.float32)
    assert len(encode(ternarise(delta, 0.05, StdScale()))) <= 129 + 24
