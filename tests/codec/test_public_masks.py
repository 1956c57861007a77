"""Public masks: known answers, exact counts, uniformity, and what linear masks are for."""

import numpy as np
import pytest

from fedpeft.codec import (
    BernoulliMask,
    PublicSource,
    RandomKMask,
    dare,
    random_k,
    select_unbiased_random_k,
    tensor_stream,
)
from fedpeft.codec.masks import keep_threshold
from fedpeft.errors import UpdateError

M64 = 2**64 - 1


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 from its definition, on Python integers."""
    c, k = list(counter), list(key)
    for step in range(10):
        if step:
            k = [(k[0] + 0x9E3779B97F4A7C15) & M64, (k[1] + 0xBB67AE8584CAA73B) & M64]
        high, low = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        other_high, other_low = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [other_high ^ c[1] ^ k[0], other_low, high ^ c[3] ^ k[1], low]
    return c


def test_the_oracle_knows_the_published_vector() -> None:
    assert slow_philox([0] * 4, [0] * 2)[:2] == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC]


def test_words_are_philox_of_round_purpose_and_tensor() -> None:
    source = PublicSource(seed=7, round=5, tensor=9)
    # NumPy's generator counts before it draws.
    expected = [word for block in (1, 2, 3) for word in slow_philox([block, 5, 2, 0], [7, 9])]
    assert source.words(12).tolist() == expected
    mask = RandomKMask(source, 5)
    assert mask.indices(12).tolist() == sorted(sorted(range(12), key=lambda i: (expected[i], i))[:5])
    half = BernoulliMask(source, 2**63)
    assert half.indices(12).tolist() == [i for i in range(12) if expected[i] < 2**63]


def test_positions_are_uniform() -> None:
    # 2,000 seeds x 5 of 20: each position binomial(2000, 1/4); 5 sigma, false alarm 2e-5 for all 20.
    hits = np.zeros(20)
    for seed in range(2000):
        chosen = RandomKMask(PublicSource(seed, 0, 0), 5).indices(20)
        assert chosen.size == 5
        hits[chosen] += 1
    assert np.abs(hits - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_streams_differ_by_seed_round_and_tensor_only() -> None:
    base = PublicSource(1, 2, 3).words(4).tolist()
    assert base == PublicSource(1, 2, 3).words(4).tolist()
    for other in (PublicSource(0, 2, 3), PublicSource(1, 0, 3), PublicSource(1, 2, 0)):
        assert other.words(4).tolist() != base
    assert tensor_stream("layer.0.lora_A") != tensor_stream("layer.0.lora_B")
    # As `printf layer.0.lora_A | b2sum -l 64` says, lowest byte first: both ends must agree.
    assert tensor_stream("layer.0.lora_A") == int.from_bytes(bytes.fromhex("8d32bbf64241354f"), "little")


def test_random_k_is_linear_over_clients_that_share_a_source() -> None:
    rng, source = np.random.default_rng(0), PublicSource(4, 1, 2)
    left, right = (rng.integers(-8, 8, (6, 7)).astype(np.float32) for _ in range(2))
    total = random_k(left + right, 0.4, source).dense()
    assert np.array_equal(random_k(left, 0.4, source).dense() + random_k(right, 0.4, source).dense(), total)


def test_unbiased_random_k_and_dare_average_to_the_delta() -> None:
    delta = np.array([1.0, -2.0, 3.0, 0.0, 4.0, -1.0], dtype=np.float32)
    runs = 3000
    kept = sum(
        select_unbiased_random_k(delta, 0.5, PublicSource(s, 0, 0)).dense().astype(float) for s in range(runs)
    )
    dropped = sum(dare(delta, 0.75, PublicSource(s, 0, 0)).dense().astype(float) for s in range(runs))
    # Standard errors |x| / sqrt(n) and |x| sqrt(3 / n); 5 sigma.
    assert np.all(np.abs(kept / runs - delta) <= 5 * np.abs(delta) / np.sqrt(runs))
    assert np.all(np.abs(dropped / runs - delta) <= 5 * np.abs(delta) * np.sqrt(3 / runs))


def test_dare_multiplies_what_it_keeps_by_the_inverse_rate() -> None:
    delta = np.arange(1, 1001, dtype=np.float32)
    dense = dare(delta, 0.9, PublicSource(1, 0, 0)).dense()
    kept = dense != 0
    assert np.allclose(dense[kept], delta[kept] * 10, rtol=1e-6)
    # Binomial(1000, 0.1) within 6 sigma.
    assert abs(int(kept.sum()) - 100) < 57
    assert np.array_equal(dare(delta, 0.0, PublicSource(1, 0, 0)).dense(), delta)


def test_values_for_another_mask_are_refused() -> None:
    kept = dare(np.arange(100, dtype=np.float32), 0.5, PublicSource(1, 0, 0))
    forged = type(kept)(kept.shape, BernoulliMask(PublicSource(2, 0, 0), 2**62), kept.values, kept.gain)
    with pytest.raises(UpdateError, match="seeds differ"):
        forged.dense()


def test_wrong_requests_are_refused() -> None:
    ones = np.ones(4, dtype=np.float32)
    for rate in (1.0, -0.1, 1.5):
        with pytest.raises(UpdateError, match="drop rate"):
            dare(ones, rate, PublicSource(0, 0, 0))
    with pytest.raises(UpdateError, match="density 0"):
        select_unbiased_random_k(ones, 0.0, PublicSource(0, 0, 0))
    with pytest.raises(UpdateError, match="2\\^64"):
        PublicSource(2**64, 0, 0)
    with pytest.raises(UpdateError, match="out of 4"):
        RandomKMask(PublicSource(0, 0, 0), 5).indices(4)


@pytest.mark.parametrize(("rate", "threshold"), [(0.0, 0), (0.5, 2**63), (1.0, 2**64), (0.25, 2**62)])
def test_thresholds_are_exact(rate: float, threshold: int) -> None:
    assert keep_threshold(rate) == threshold
