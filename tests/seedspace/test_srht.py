from collections.abc import Callable, Iterable

import pytest
import torch

from fedpeft.errors import UpdateError
from fedpeft.seedspace.layout import CounterStream, Purpose
from fedpeft.seedspace.srht import BlockHadamard, hadamard, sample_rows

SignsOf = Callable[[int, int, int, int, int, Iterable[int]], list[int]]


def sylvester(length: int) -> torch.Tensor:
    return torch.tensor([[(-1) ** (i & j).bit_count() for j in range(length)] for i in range(length)])


def draws(size: int, seed: int) -> torch.Tensor:
    return torch.randint(-1000, 1000, (size,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 8, 64])
def test_the_fast_transform_is_the_matrix(length: int) -> None:
    values = draws(3 * length, 1).view(3, length)
    assert hadamard(values).equal(values @ sylvester(length))


@pytest.mark.parametrize(("size", "block", "rows"), [(64, 64, 5), (150, 32, 32), (7, 8, 3), (1, 1, 1)])
def test_projection_and_reconstruction_by_explicit_matrices(
    signs_of: SignsOf, size: int, block: int, rows: int
) -> None:
    transform = BlockHadamard(seed=2**33 + 5, step=4, tensor_id=9, size=size, block=block, rows=rows)
    delta = draws(size, size)
    signs = torch.tensor(signs_of(2**33 + 5, Purpose.HADAMARD_SIGNS, 4, 9, 0, range(size)))
    padded = torch.zeros(transform.num_blocks * block, dtype=torch.int64)
    padded[:size] = delta * signs
    stream = CounterStream(2**33 + 5, Purpose.HADAMARD_ROWS, 4)
    expected, back = [], []
    for number, part in enumerate(padded.view(-1, block)):
        kept = sylvester(block)[sample_rows(stream, 9, number, block, rows)]
        expected.append(kept @ part)
        back.append(kept.T @ expected[-1])
    coefficients = transform.project(delta)
    assert coefficients.equal(torch.stack(expected))
    assert transform.num_coefficients == coefficients.numel()
    assert transform.reconstruct(coefficients).equal(torch.cat(back)[:size] * signs)


def test_all_rows_give_everything_back_exactly() -> None:
    transform = BlockHadamard(seed=1, step=0, tensor_id=0, size=300, block=128, rows=128)
    delta = draws(300, 2)
    assert transform.reconstruct(transform.project(delta)).equal(128 * delta)


def test_projection_is_additive() -> None:
    transform = BlockHadamard(seed=1, step=0, tensor_id=0, size=300, block=64, rows=7)
    one, other = draws(300, 3), draws(300, 4)
    assert transform.project(one + other).equal(transform.project(one) + transform.project(other))


def test_the_estimate_is_unbiased() -> None:
    """Mean of 1,000 rounds against x, in standard errors: beyond 5.5 in one of 400,000 runs."""
    delta, rounds, rows = draws(64, 5), 1000, 16
    estimates = torch.empty(rounds, 64, dtype=torch.float64)
    for step in range(rounds):
        transform = BlockHadamard(seed=8, step=step, tensor_id=1, size=64, block=64, rows=rows)
        estimates[step] = transform.reconstruct(transform.project(delta)).double() / rows
    errors = (estimates.mean(0) - delta).abs() / (estimates.std(0) / rounds**0.5)
    assert errors.max() < 5.5


def test_rows_by_the_shuffle_written_out(philox_of: Callable[..., tuple[int, ...]]) -> None:
    words = [word for group in range(3) for word in philox_of((group, 0, 6, 4 * 2**24 + 2), (11, 3))]
    order = list(range(20))
    for place in range(10):
        other = place + words[place] * (20 - place) // 2**32
        order[place], order[other] = order[other], order[place]
    assert sample_rows(CounterStream(3, Purpose.HADAMARD_ROWS, 2), 6, 11, 20, 10) == sorted(order[:10])


def test_rows_are_different_and_all_occur() -> None:
    stream = CounterStream(1, Purpose.HADAMARD_ROWS)
    assert sample_rows(stream, 0, 0, 16, 16) == list(range(16))
    seen = {row for block in range(200) for row in sample_rows(stream, 0, block, 16, 2)}
    assert seen == set(range(16))


class TestRefusals:
    @pytest.mark.parametrize(
        ("size", "block", "rows"), [(5, 6, 1), (5, 0, 1), (5, 8, 0), (5, 8, 9), (0, 8, 1)]
    )
    def test_shapes_that_make_no_transform(self, size: int, block: int, rows: int) -> None:
        with pytest.raises(UpdateError):
            BlockHadamard(seed=0, step=0, tensor_id=0, size=size, block=block, rows=rows)

    def test_other_shapes_types_and_magnitudes(self) -> None:
        transform = BlockHadamard(seed=0, step=0, tensor_id=0, size=8, block=8, rows=2)
        with pytest.raises(UpdateError, match="need int64"):
            transform.project(torch.zeros(8))
        with pytest.raises(UpdateError, match="need int64"):
            transform.reconstruct(torch.zeros(2, 1, dtype=torch.int64))
        with pytest.raises(UpdateError, match="overflow"):
            transform.project(torch.full((8,), 2**59))
