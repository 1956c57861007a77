"""Position coders: exactness, size against the entropy, and slow decoders written from the format."""

import importlib.util
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.codec.entropy import ternary_entropy_bits
from fedpeft.codec.golomb import rice_parameter
from fedpeft.codec.position_coders import CODER_BYTES, CODERS, DEFAULT_CODER, coder_named, coder_of_byte
from fedpeft.codec.rans import gap_model
from fedpeft.errors import UpdateError

CODER_NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "constriction" and importlib.util.find_spec("constriction") is None,
            reason="needs the package constriction",
        ),
    )
    for name in CODERS
]


def random_positions(density: float, size: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.flatnonzero(np.random.default_rng(seed).random(size) < density).astype(np.int32)


@pytest.mark.parametrize("name", CODER_NAMES)
@settings(deadline=None, max_examples=150)
@given(size=st.integers(0, 3000), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_decoding_inverts_encoding(name: str, size: int, share: float, seed: int) -> None:
    indices = random_positions(share**3, size, seed)
    data = CODERS[name].encode(indices, size)
    back = CODERS[name].decode(memoryview(data), indices.size, size)
    assert back.dtype == np.int32
    assert back.tolist() == indices.tolist()


@pytest.mark.parametrize("name", CODER_NAMES)
@pytest.mark.parametrize("indices", [[0], [99_999], [0, 99_999], [50_000, 50_001], [99_998, 99_999]])
def test_long_gaps_and_edges(name: str, indices: list[int]) -> None:
    # Clusters are the opposite of what the model expects: size may suffer, exactness may not.
    data = CODERS[name].encode(np.array(indices, dtype=np.int32), 100_000)
    assert CODERS[name].decode(memoryview(data), len(indices), 100_000).tolist() == indices


@pytest.mark.parametrize("name", CODER_NAMES)
def test_a_dense_block_in_a_large_tensor(name: str) -> None:
    indices = np.arange(20_000, 30_000, dtype=np.int32)
    data = CODERS[name].encode(indices, 100_000)
    assert np.array_equal(CODERS[name].decode(memoryview(data), 10_000, 100_000), indices)


def test_gaps_up_to_the_largest_tensor() -> None:
    largest = 2**31 - 1
    indices = np.array([0, 1, largest - 1], dtype=np.int32)
    for name in ("rans", "golomb"):
        data = CODERS[name].encode(indices, largest)
        assert CODERS[name].decode(memoryview(data), 3, largest).tolist() == indices.tolist()


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_default_coder_is_within_one_percent_of_the_entropy(density: float) -> None:
    size = 400_000
    indices = random_positions(density, size)
    bits = (8 * len(CODERS[DEFAULT_CODER].encode(indices, size)) + indices.size) / size
    assert bits / ternary_entropy_bits(indices.size, size) < 1.0025


@pytest.mark.parametrize(
    ("density", "parameter", "bits"),
    [
        (0.01, 6, 0.0911),
        (0.05, 4, 0.3393),
        (0.1, 3, 0.5756),
        (0.2, 2, 0.9388),
        (0.3, 1, 1.188),
        (0.5, 0, 1.5),
    ],
)
def test_golomb_has_the_published_parameter_and_size(density: float, parameter: int, bits: float) -> None:
    size = 1_000_000
    indices = random_positions(density, size)
    assert rice_parameter(indices.size, size) == parameter
    measured = (8 * len(CODERS["golomb"].encode(indices, size)) + indices.size) / size
    # The count is binomial: four standard deviations of it, as a share of the size.
    assert measured == pytest.approx(bits, rel=4 * math.sqrt((1 - density) / (density * size)) + 1e-3)


@pytest.mark.parametrize(
    ("density", "bits"),
    [(0.01, 0.0908), (0.05, 0.3364), (0.1, 0.5690), (0.2, 0.9219), (0.3, 1.181), (0.5, 1.500)],
)
def test_entropy_table(density: float, bits: float) -> None:
    assert ternary_entropy_bits(round(density * 10**6), 10**6) == pytest.approx(bits, rel=1e-3)


def slow_golomb(data: bytes, count: int) -> list[int]:
    bits = [byte >> place & 1 for byte in data[1:] for place in range(8)]
    positions, at, position = [], 0, -1
    for _ in range(count):
        quotient = 0
        while bits[at]:
            quotient, at = quotient + 1, at + 1
        remainder = sum(bits[at + 1 + place] << place for place in range(data[0]))
        at += 1 + data[0]
        position += 1 + (quotient << data[0]) + remainder
        positions.append(position)
    assert not any(bits[at:])
    assert len(bits) - at < 8
    return positions


def slow_rans(data: bytes, count: int, size: int) -> list[int]:
    model = gap_model(count, size)
    low_bytes, lanes = (count * model.shift + 7) // 8, 4 if count >= 4096 else 1
    low = int.from_bytes(data[:low_bytes], "little")
    head, words = data[low_bytes : low_bytes + 4 * lanes], list(data[low_bytes + 4 * lanes :])
    states = [int.from_bytes(head[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    positions, step, position = [], 0, -1
    for i in range(count):
        gap = low >> (i * model.shift) & ((1 << model.shift) - 1)
        symbol = model.escape
        while symbol == model.escape:
            lane = step % lanes
            slot = states[lane] % 4096
            symbol = max(s for s in range(model.escape + 1) if model.starts[s] <= slot)
            width = model.starts[symbol + 1] - model.starts[symbol]
            states[lane] = width * (states[lane] // 4096) + slot - model.starts[symbol]
            if states[lane] < 2**16:
                states[lane] = states[lane] << 16 | words.pop(0) | words.pop(0) << 8
            gap += symbol << model.shift
            step += 1
        position += 1 + gap
        positions.append(position)
    assert states == [2**16] * lanes
    assert not words
    return positions


@pytest.mark.parametrize(
    ("size", "density"), [(3072, 0.05), (500, 0.4), (20_000, 0.3), (9, 0.5), (5000, 0.001)]
)
def test_slow_decoders_read_the_same_positions(size: int, density: float) -> None:
    indices = random_positions(density, size, seed=7)
    expected = indices.tolist()
    assert slow_golomb(CODERS["golomb"].encode(indices, size), indices.size) == expected
    assert slow_rans(CODERS["rans"].encode(indices, size), indices.size, size) == expected


@settings(deadline=None, max_examples=300)
@given(st.integers(2, 2**31 - 1), st.data())
def test_every_gap_model_is_a_distribution_with_room_for_each_symbol(size: int, data: st.DataObject) -> None:
    count = data.draw(st.one_of(st.integers(1, size - 1), st.integers(1, min(size - 1, 1000))))
    model = gap_model(count, size)
    assert model.starts[0] == 0
    assert model.starts[-1] == 4096
    assert all(left < right for left, right in zip(model.starts, model.starts[1:], strict=False))
    # Symbols are bytes, and an escape must make progress.
    assert 1 <= model.escape <= 255
    assert 0 <= model.shift <= 30


KNOWN_ANSWERS = [
    ("rans", "20222222222222225a01570a08929bc71df9b9ba91eb641c16cd99dd"),
    ("golomb", "040010c420c53c48a22c4ce37c3019cd86d3f1fce0e4e8ecf0f418"),
]


@pytest.mark.parametrize(("name", "answer"), KNOWN_ANSWERS)
def test_known_answers_pin_the_format(name: str, answer: str) -> None:
    # Squares below 1000: bytes that any machine and any release must write and read.
    squares = np.array([n * n for n in range(32)], dtype=np.int32)
    assert CODERS[name].encode(squares, 1000).hex() == answer
    assert CODERS[name].decode(memoryview(bytes.fromhex(answer)), 32, 1000).tolist() == squares.tolist()


@pytest.mark.parametrize("name", CODER_NAMES)
def test_damaged_bytes_never_give_more_than_was_asked_for(name: str) -> None:
    size, rng = 3000, np.random.default_rng(11)
    indices = random_positions(0.05, size)
    honest = bytearray(CODERS[name].encode(indices, size))
    for _ in range(400):
        damaged = bytearray(honest)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        del damaged[len(damaged) - int(rng.integers(0, 3)) :]
        try:
            read = CODERS[name].decode(memoryview(bytes(damaged)), indices.size, size)
        except UpdateError:
            continue
        assert read.size == indices.size
        assert read[0] >= 0
        assert read[-1] < size
        assert (np.diff(read) > 0).all()


@pytest.mark.parametrize("name", CODER_NAMES)
def test_bytes_that_do_not_fit_are_refused(name: str) -> None:
    coder, indices = CODERS[name], random_positions(0.1, 5000)
    data = coder.encode(indices, 5000)
    for wrong in (b"", data[:-4], data + b"\x01\x00\x00\x00", bytes(len(data))):
        with pytest.raises(UpdateError):
            coder.decode(memoryview(wrong), indices.size, 5000)
    for count in (0, 5000):
        with pytest.raises(UpdateError, match="none is needed"):
            coder.decode(memoryview(data), count, 5000)


def test_tables_of_names_are_complete() -> None:
    assert CODERS.keys() == CODER_BYTES.keys()
    assert len(set(CODER_BYTES.values())) == len(CODERS) == 3
    assert all(coder_of_byte(CODER_BYTES[name]) is coder_named(name) for name in CODERS)
    with pytest.raises(UpdateError, match="choose one of rans, golomb"):
        coder_named("huffman")
    with pytest.raises(UpdateError, match="coder 9"):
        coder_of_byte(9)
