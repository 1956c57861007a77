"""The three kernels against the pure-Python oracle, on every backend of this machine."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import MissingExtraError, TrainingError, UpdateError
from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.backends import kernels_for
from fedpeft.seedspace.layout import CounterStream, Purpose, Span
from fedpeft.seedspace.perturb import perturb, perturb_rows
from fedpeft.seedspace.project import project

SignsOf = Callable[[int, int, int, int, int, Iterable[int]], list[int]]
CPU_BACKENDS = ["numba", "torch"]

streams = st.builds(
    CounterStream,
    seed=st.integers(0, 2**64 - 1),
    purpose=st.sampled_from(Purpose),
    step=st.integers(0, 2**24 - 1),
)
# Ends beyond the 32-bit block counter's sign and around block edges; lengths that are no multiple of 128.
spans = st.builds(
    lambda tensor_id, start, size: Span(tensor_id, start, start + size),
    st.integers(0, 2**32 - 1),
    st.one_of(st.integers(0, 300), st.integers(128 * 2**31 - 200, 128 * 2**31)),
    st.integers(0, 400),
)
directions = st.integers(0, 2**32 - 1)


def matrix(signs_of: SignsOf, stream: CounterStream, span: Span, which: list[int]) -> list[list[int]]:
    return [
        signs_of(stream.seed, stream.purpose, stream.step, span.tensor_id, k, range(span.start, span.stop))
        for k in which
    ]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(deadline=None, max_examples=25)
@given(streams, spans, st.lists(st.tuples(directions, st.integers(-(2**49), 2**49)), max_size=6))
def test_accumulate(
    signs_of: SignsOf, backend: str, stream: CounterStream, span: Span, pairs: list[tuple[int, int]]
) -> None:
    which, amounts = [k for k, _ in pairs], [a for _, a in pairs]
    rows = matrix(signs_of, stream, span, which)
    expected = [sum(a * row[i] for a, row in zip(amounts, rows, strict=True)) for i in range(span.size)]
    got = accumulate(
        stream,
        span,
        torch.tensor(which, dtype=torch.int64),
        torch.tensor(amounts, dtype=torch.int64),
        backend=backend,
    )
    assert got.tolist() == expected


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(deadline=None, max_examples=25)
@given(streams, spans, st.lists(directions, max_size=4), st.integers(0, 50), st.integers(0, 2**32))
def test_project(
    signs_of: SignsOf, backend: str, stream: CounterStream, span: Span, which: list[int], bits: int, seed: int
) -> None:
    delta = np.random.default_rng(seed).integers(-(2**bits), 2**bits, size=span.size, endpoint=True)
    expected = [
        sum(s * d for s, d in zip(row, delta.tolist(), strict=True))
        for row in matrix(signs_of, stream, span, which)
    ]
    got = project(
        stream, span, torch.tensor(which, dtype=torch.int64), torch.from_numpy(delta), backend=backend
    )
    assert got.tolist() == expected


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@settings(deadline=None, max_examples=15)
@given(streams, spans, directions, st.floats(-1, 1))
def test_perturb(
    signs_of: SignsOf,
    dtype: torch.dtype,
    backend: str,
    stream: CounterStream,
    span: Span,
    direction: int,
    scale: float,
) -> None:
    weights = torch.linspace(-3, 3, span.size).to(dtype)
    before = weights.clone()
    signs = torch.tensor(matrix(signs_of, stream, span, [direction])[0], dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (weights.to(wide) + signs.to(wide) * torch.tensor(scale, dtype=wide)).to(dtype)
    got = perturb(stream, span.tensor_id, direction, weights, scale, start=span.start, backend=backend)
    assert got.dtype == dtype
    assert got.equal(expected)
    assert weights.equal(before)
    perturb(stream, span.tensor_id, direction, weights, scale, start=span.start, out=weights, backend=backend)
    assert weights.equal(expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 128, 200])
def test_looked_up_rows_are_rows_of_the_perturbed_table(backend: str, dtype: torch.dtype, width: int) -> None:
    stream, table = (
        CounterStream(3),
        torch.randn(40, width, generator=torch.Generator().manual_seed(1)).to(dtype),
    )
    rows = torch.tensor([39, 0, 7, 7, 38])
    whole = perturb(stream, 2, 5, table, 1e-2, backend=backend)
    assert perturb_rows(stream, 2, 5, table, rows, 1e-2, backend=backend).equal(whole[rows])


@pytest.mark.parametrize("size", [16_385, 40_000])
def test_no_cut_order_or_number_of_threads_shows(size: int) -> None:
    """Sizes beyond one tile, more directions than one chunk of the schedule, both backends."""
    generator = torch.Generator().manual_seed(size)
    stream, which = CounterStream(2**50 + 3), torch.randperm(1000, generator=generator)[:150]
    amounts = torch.randint(-5000, 5000, (150,), generator=generator)
    whole = accumulate(stream, Span(4, 0, size), which, amounts)
    order = torch.randperm(150, generator=generator)
    assert accumulate(stream, Span(4, 0, size), which[order], amounts[order], threads=2).equal(whole)
    assert accumulate(stream, Span(4, 0, size), which, amounts, threads=3, backend="torch").equal(whole)
    cut = [(0, 1), (1, 300), (300, 16_384), (16_384, size)]
    pieces = [accumulate(stream, Span(4, first, last), which, amounts) for first, last in cut]
    assert torch.cat(pieces).equal(whole)
    delta = torch.randint(-(2**20), 2**20, (size,), generator=generator)
    products = project(stream, Span(4, 0, size), which, delta)
    assert project(stream, Span(4, 0, size), which[order], delta, threads=2).equal(products[order])
    assert project(stream, Span(4, 0, size), which, delta, backend="torch").equal(products)
    parts = [project(stream, Span(4, a, b), which, delta[a:b]) for a, b in cut]
    assert torch.stack(parts).sum(0).equal(products)


def test_projection_and_accumulation_are_adjoint() -> None:
    """<sum_k A_k z_k, delta> = sum_k A_k <z_k, delta>, in integers."""
    generator = torch.Generator().manual_seed(5)
    span, which = Span(1, 64, 3000), torch.arange(50)
    amounts = torch.randint(-99, 99, (50,), generator=generator)
    delta = torch.randint(-999, 999, (span.size,), generator=generator)
    left = accumulate(CounterStream(9), span, which, amounts) @ delta
    assert left == amounts @ project(CounterStream(9), span, which, delta)


def test_purposes_steps_tensors_and_directions_differ() -> None:
    """Any two correlate by less than 5 / sqrt(n) over n = 20,000 coordinates; false alarm 1e-5."""
    span = Span(0, 0, 20_000)
    one, unit = torch.tensor([1]), torch.tensor([1])
    draws = [
        accumulate(CounterStream(1), span, one, unit),
        accumulate(CounterStream(1), span, one + 1, unit),
        accumulate(CounterStream(1, step=1), span, one, unit),
        accumulate(CounterStream(1, Purpose.MASK), span, one, unit),
        accumulate(CounterStream(1 + 2**32), span, one, unit),
        accumulate(CounterStream(1), Span(1, 0, 20_000), one, unit),
        torch.ones(span.size, dtype=torch.int64),
    ]
    gram = torch.stack(draws).double()
    gram = gram @ gram.T / span.size
    assert (gram - torch.eye(len(draws))).abs().max() < 5 / span.size**0.5


class TestRefusals:
    span = Span(0, 0, 10)
    one = torch.tensor([0])

    def test_amounts_that_could_overflow(self) -> None:
        half = torch.tensor([2**52, -(2**52)])
        with pytest.raises(UpdateError, match=r"below 2\^53"):
            accumulate(CounterStream(0), self.span, torch.arange(2), half)
        accumulate(CounterStream(0), self.span, torch.arange(2), half - torch.tensor([1, 0]))

    @pytest.mark.parametrize(
        "amounts",
        [
            torch.tensor([1, 2]),
            torch.tensor([1.0]),
            torch.tensor([[1]]),
            torch.tensor([1], dtype=torch.int32),
        ],
    )
    def test_amounts_of_another_shape_or_type(self, amounts: torch.Tensor) -> None:
        with pytest.raises(UpdateError, match="need one int64 each"):
            accumulate(CounterStream(0), self.span, self.one, amounts)

    @pytest.mark.parametrize("which", [-1, 2**32])
    def test_directions_out_of_range(self, which: int) -> None:
        with pytest.raises(UpdateError, match="direction indices"):
            accumulate(CounterStream(0), self.span, torch.tensor([which]), self.one)

    def test_a_delta_that_could_overflow(self) -> None:
        delta = torch.zeros(10, dtype=torch.int64)
        delta[3] = -(2**58)
        with pytest.raises(UpdateError, match="coarser quantum"):
            project(CounterStream(0), self.span, self.one, delta)

    def test_a_delta_of_another_size(self) -> None:
        with pytest.raises(UpdateError, match=r"need int64 \[10\]"):
            project(CounterStream(0), self.span, self.one, torch.zeros(9, dtype=torch.int64))

    @pytest.mark.parametrize("scale", [float("nan"), float("inf")])
    def test_a_scale_that_is_not_finite(self, scale: float) -> None:
        with pytest.raises(UpdateError, match="not finite"):
            perturb(CounterStream(0), 0, 0, torch.zeros(3), scale)

    def test_integer_weights(self) -> None:
        with pytest.raises(TrainingError, match="only floating-point"):
            perturb(CounterStream(0), 0, 0, torch.zeros(3, dtype=torch.int8), 0.1)

    def test_a_strided_buffer(self) -> None:
        with pytest.raises(TrainingError, match="contiguous"):
            perturb(CounterStream(0), 0, 0, torch.zeros(3), 0.1, out=torch.zeros(6)[::2])

    def test_unknown_backends_and_devices(self) -> None:
        with pytest.raises(TrainingError, match="choose one of"):
            kernels_for(torch.device("cpu"), "cupy")
        with pytest.raises((TrainingError, MissingExtraError), match="triton"):
            kernels_for(torch.device("cpu"), "triton")
        assert kernels_for(torch.device("cpu")).name == "numba"
        assert kernels_for(torch.device("meta")).name == "torch"
