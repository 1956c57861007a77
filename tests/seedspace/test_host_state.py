"""The server's position in seed space without torch: the bits of the one with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.seedspace.host_state import HostState, apply_sums
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.rounding import combine
from fedpeft.seedspace.space import SeedSpace
from fedpeft.seedspace.state import SeedState

K, EXPONENT = 37, -12
SHAPES = {"b": (300,), "a": (5, 129), "c": (2, 0)}


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def words(hexadecimal: str) -> list[int]:
    return [int(hexadecimal[start : start + 8], 16) for start in range(0, 64, 8)]


def test_fingerprints_of_a_walk_are_those_of_torch() -> None:
    base = weights(0)
    host = HostState(CounterStream(5), K, EXPONENT, base)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in base.items()}
    state = SeedState(SeedSpace(CounterStream(5), K, EXPONENT, SHAPES), tensors)
    rng = np.random.default_rng(1)
    for _ in range(4):
        amounts = rng.integers(-1000, 1000, K)
        state.advance(torch.from_numpy(amounts) - state.amounts)
        assert host.fingerprint(amounts).tolist() == words(state.fingerprint())
    assert host.fingerprint(np.zeros(K, dtype=np.int64)).tolist() == words(
        SeedState(SeedSpace(CounterStream(5), K, EXPONENT, SHAPES), tensors).fingerprint()
    )


@pytest.mark.parametrize("exponent", [-12, -70, 40])
def test_a_weight_is_rounded_once_also_where_doubles_are_too_short(exponent: int) -> None:
    rng = np.random.default_rng(2)
    base = (rng.standard_normal(4000) * 10.0 ** rng.integers(-20, 20, 4000)).astype(np.float32)
    sums = rng.integers(-(2**31) + 1, 2**31, 4000).astype(np.int32)
    wanted = combine(torch.from_numpy(base), torch.from_numpy(sums), exponent).numpy()
    assert apply_sums(base, sums, 2.0**exponent).tobytes() == wanted.tobytes()


def test_a_base_that_cannot_be_written_is_only_read() -> None:
    base = weights(3)
    for array in base.values():
        array.flags.writeable = False
    before = {name: array.tobytes() for name, array in base.items()}
    HostState(CounterStream(1), K, EXPONENT, base).fingerprint(np.arange(K))
    assert {name: array.tobytes() for name, array in base.items()} == before
