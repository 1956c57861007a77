import pytest

from fedpeft.errors import ModelError, TrainingError
from fedpeft.seedspace.layout import (
    MAX_COORDINATES,
    CounterStream,
    Purpose,
    Span,
    canonical_names,
    tensor_ids,
)


def test_ids_are_ranks_of_sorted_names_whatever_their_order() -> None:
    names = ["b.weight", "a.weight", "B.weight", "a.bias"]
    assert tensor_ids(names) == tensor_ids(reversed(names))
    assert tensor_ids(names) == {"B.weight": 0, "a.bias": 1, "a.weight": 2, "b.weight": 3}


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="comes twice"):
        tensor_ids(["w", "v", "w"])


def test_tied_weights_share_the_smallest_name() -> None:
    names = canonical_names({"lm_head.weight": 7, "embed.weight": 7, "norm.weight": 9})
    assert names == {
        "lm_head.weight": "embed.weight",
        "embed.weight": "embed.weight",
        "norm.weight": "norm.weight",
    }


def test_every_field_has_bits_of_its_own() -> None:
    stream = CounterStream(seed=0x0123456789ABCDEF, purpose=Purpose.HADAMARD_ROWS, step=0xABCDEF)
    assert stream.counter_words(0x55) == (0x01234567, 0x55, 0x04ABCDEF)
    assert stream.key_word == 0x89ABCDEF


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**24)])
def test_fields_that_do_not_fit_are_refused(seed: int, step: int) -> None:
    with pytest.raises(TrainingError, match="does not fit"):
        CounterStream(seed, step=step)


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (5, 4), (0, MAX_COORDINATES + 1)])
def test_ranges_that_are_none_are_refused(start: int, stop: int) -> None:
    with pytest.raises(TrainingError, match="no range"):
        Span(0, start, stop)


@pytest.mark.parametrize(
    ("start", "stop", "blocks"),
    [(0, 0, 0), (0, 1, 1), (0, 128, 1), (0, 129, 2), (127, 129, 2), (128, 256, 1), (300, 300, 0)],
)
def test_blocks_touched_by_a_range(start: int, stop: int, blocks: int) -> None:
    assert Span(0, start, stop).num_blocks == blocks
