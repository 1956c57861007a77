"""Our conversions of Flower's arrays against Flower's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from numpy.typing import NDArray

from fedpeft.transport.array_bytes import array_of, values_of

CASES = [
    np.arange(12.0).reshape(3, 4),
    np.zeros((0, 3), np.float32),
    np.arange(5, dtype=np.float32),
    np.arange(7),
    np.array(3.0),
]


@pytest.mark.parametrize("values", CASES, ids=str)
def test_an_array_is_byte_for_byte_flowers_own(values: NDArray[Any]) -> None:
    ours, flowers = array_of(values), Array(values)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (
        flowers.dtype,
        flowers.shape,
        flowers.stype,
        flowers.data,
    )


@pytest.mark.parametrize("values", [*CASES, np.asfortranarray(np.arange(6.0).reshape(2, 3))], ids=str)
def test_values_come_back_from_flowers_own_bytes(values: NDArray[Any]) -> None:
    came = values_of(Array(values))
    assert (came.dtype, came.shape) == (values.dtype, values.shape)
    assert np.array_equal(came, values)


def test_other_forms_of_bytes_are_left_to_flower() -> None:
    with pytest.raises(TypeError, match="serialization"):
        values_of(Array("float32", (1,), "torch.tensor", b"1234"))
