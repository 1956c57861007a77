from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.seedspace.philox import philox_numpy, philox_torch

Counter = tuple[int, int, int, int]
Key = tuple[int, int]
ONES = 0xFFFFFFFF

# Random123, tests/kat_vectors: counter, key, 10 rounds, 7 rounds.
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    ),
    (
        (ONES,) * 4,
        (ONES,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def in_numpy(counter: Counter, key: Key, rounds: int) -> tuple[int, ...]:
    return tuple(int(word) for word in philox_numpy(counter, key, rounds))


def in_torch(counter: Counter, key: Key, rounds: int) -> tuple[int, ...]:
    return tuple(int(word) for word in philox_torch(counter, key, rounds))


@pytest.mark.parametrize("generator", [in_numpy, in_torch])
@pytest.mark.parametrize(("counter", "key", "ten", "seven"), KNOWN)
def test_known_answers(
    generator: Callable[[Counter, Key, int], tuple[int, ...]],
    counter: Counter,
    key: Key,
    ten: tuple[int, ...],
    seven: tuple[int, ...],
) -> None:
    assert generator(counter, key, 10) == ten
    assert generator(counter, key, 7) == seven


@pytest.mark.parametrize(("counter", "key", "ten", "seven"), KNOWN)
def test_the_oracle_knows_the_answers_too(
    philox_of: Callable[..., tuple[int, ...]],
    counter: Counter,
    key: Key,
    ten: tuple[int, ...],
    seven: tuple[int, ...],
) -> None:
    assert philox_of(counter, key) == ten
    assert philox_of(counter, key, 7) == seven


word = st.integers(0, ONES)


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_all_implementations_agree(
    philox_of: Callable[..., tuple[int, ...]], counter: Counter, key: Key
) -> None:
    expected = philox_of(counter, key)
    assert in_numpy(counter, key, 10) == expected
    assert in_torch(counter, key, 10) == expected


def test_words_broadcast() -> None:
    blocks = np.arange(5, dtype=np.uint64)
    many = np.stack(philox_numpy((blocks, 1, 2, 3), (4, 5)))
    alone = np.stack([np.stack(philox_numpy((int(block), 1, 2, 3), (4, 5))) for block in blocks], axis=1)
    assert (many == alone).all()
    in_int64 = torch.stack(philox_torch((torch.arange(5), 1, 2, 3), (4, 5)))
    assert in_int64.tolist() == many.tolist()
