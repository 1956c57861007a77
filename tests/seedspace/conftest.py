"""A pure-Python oracle for signs, written from the specification with unbounded integers."""

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

SignsOf = Callable[[int, int, int, int, int, Iterable[int]], list[int]]

M0, M1, W0, W1, MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 2**32 - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 10) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    for turn in range(rounds):
        k0, k1 = (key[0] + turn * W0) & MASK, (key[1] + turn * W1) & MASK
        high0, low0 = divmod(M0 * c0, 2**32)
        high1, low1 = divmod(M1 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def signs(
    seed: int, purpose: int, step: int, tensor_id: int, direction: int, positions: Iterable[int]
) -> list[int]:
    result = []
    known: dict[int, tuple[int, ...]] = {}
    for position in positions:
        block = position // 128
        if block not in known:
            counter = (block, seed // 2**32, tensor_id, purpose * 2**24 + step)
            known[block] = philox(counter, (direction, seed % 2**32))
        word = known[block][position // 32 % 4]
        result.append(1 if word // 2 ** (position % 32) % 2 else -1)
    return result


@pytest.fixture(scope="session")
def philox_of() -> Callable[..., tuple[int, ...]]:
    return philox


@pytest.fixture(scope="session")
def signs_of() -> SignsOf:
    """signs_of(seed, purpose, step, tensor_id, direction, positions) -> list of +1 and -1."""
    return signs


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small operations on several threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
