import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.seedspace.scalar_codec import decode_amounts, encode_amounts

Amounts = NDArray[np.int64]

vectors = st.lists(st.one_of(st.just(0), st.integers(-5, 5), st.integers(-(2**40), 2**40)), max_size=60).map(
    lambda values: np.array(values, dtype=np.int64)
)


def largest(amounts: Amounts) -> int:
    return int(np.abs(amounts).max(initial=0))


def visited(seeds: int, visits: int, spread: float, seed: int) -> Amounts:
    """Scalars of `visits` steps over `seeds` candidates, normal and rounded."""
    rng = np.random.default_rng(seed)
    amounts = np.zeros(seeds, dtype=np.int64)
    scalars = np.rint(rng.normal(0, spread, visits)).astype(np.int64)
    np.add.at(amounts, rng.integers(0, seeds, visits), scalars)
    return amounts


@given(vectors)
def test_round_trip(amounts: Amounts) -> None:
    payload = encode_amounts(amounts)
    back = decode_amounts(payload, len(amounts), largest(amounts))
    assert back.dtype == np.int64
    assert back.tolist() == amounts.tolist()


def test_the_layout_by_hand() -> None:
    """K = 5, amounts at 1 and 4. Gaps 1 and 2 at b = 0: 10 110. Values -1 and +3 at b = 0: 1 0, 0 110."""
    payload = encode_amounts(np.array([0, -1, 0, 0, 3], dtype=np.int64))
    head, body = payload[:5], payload[5:]
    assert list(head) == [0x51, 5, 2, 0, 0]
    assert f"{int.from_bytes(body, 'big'):016b}" == "1011010011000000"


def test_bytes_of_a_round_are_near_the_entropy() -> None:
    """K = 4096, tau = 200: within 8% of the entropy of positions and rounded normals, plus 8 bytes."""
    spread = 40.0
    up, down = visited(4096, 200, spread, 1), visited(4096, 2000, spread, 2)
    for amounts, limit in ((up, 1024), (down, 8192)):
        share = np.count_nonzero(amounts) / len(amounts)
        positions = -len(amounts) * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
        values = np.count_nonzero(amounts) * np.log2(amounts[amounts != 0].std() * np.sqrt(2 * np.pi * np.e))
        size = len(encode_amounts(amounts))
        assert size < limit
        assert size < 1.08 * (positions + values) / 8 + 8


@given(vectors.filter(lambda amounts: bool(np.any(amounts))), st.data())
def test_every_truncation_is_refused(amounts: Amounts, data: st.DataObject) -> None:
    payload = encode_amounts(amounts)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(UpdateError):
        decode_amounts(payload[:cut], len(amounts), largest(amounts))


@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 1000))
def test_any_bytes_decode_or_are_refused(noise: bytes, seeds: int, limit: int) -> None:
    for payload in (noise, bytes([0x51, seeds % 128]) + noise):
        try:
            amounts = decode_amounts(payload, seeds, limit)
        except UpdateError:
            continue
        assert amounts.shape == (seeds,)
        assert largest(amounts) <= limit


class TestRefusals:
    amounts = np.array([0, 7, 0, -2, 0, 0], dtype=np.int64)

    def test_another_number_of_seeds(self) -> None:
        with pytest.raises(UpdateError, match="K = 6: this run has K = 7"):
            decode_amounts(encode_amounts(self.amounts), 7, 100)

    def test_a_scalar_beyond_the_agreed_range(self) -> None:
        decode_amounts(encode_amounts(self.amounts), 6, 7)
        with pytest.raises(UpdateError, match="agreed range"):
            decode_amounts(encode_amounts(self.amounts), 6, 6)

    def test_bytes_behind_the_end(self) -> None:
        with pytest.raises(UpdateError, match="follow the last"):
            decode_amounts(encode_amounts(self.amounts) + b"\0", 6, 7)

    def test_a_count_that_the_bytes_cannot_hold(self) -> None:
        with pytest.raises(UpdateError, match="truncated"):
            decode_amounts(bytes([0x51, 6, 6, 0, 0, 0]), 6, 7)

    def test_more_scalars_than_seeds(self) -> None:
        with pytest.raises(UpdateError, match="each seed once"):
            decode_amounts(bytes([0x51, 6, 7, 0, 0, 0, 0, 0]), 6, 7)

    def test_an_unknown_seed(self) -> None:
        gap_six = bytes([0x51, 6, 1, 0, 0, 0b11111100, 0])
        with pytest.raises(UpdateError, match="seed index 6 is unknown"):
            decode_amounts(gap_six, 6, 7)

    def test_another_format(self) -> None:
        with pytest.raises(UpdateError, match="another version"):
            decode_amounts(b"\x52\0\0\0\0", 0, 0)

    def test_a_head_without_end(self) -> None:
        with pytest.raises(UpdateError, match="no end"):
            decode_amounts(b"\x51" + b"\xff" * 6, 6, 7)

    @pytest.mark.parametrize("amounts", [np.zeros(3), np.zeros((2, 2), dtype=np.int64)])
    def test_what_is_no_vector_of_integers(self, amounts: Amounts) -> None:
        with pytest.raises(UpdateError, match="need int64"):
            encode_amounts(amounts)

    @pytest.mark.parametrize("value", [2**62, -(2**62), -(2**63)])
    def test_amounts_too_large_to_send(self, value: int) -> None:
        with pytest.raises(UpdateError, match=r"2\^62"):
            encode_amounts(np.array([value], dtype=np.int64))
