"""An update whose values are compressed is a message and no vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedpeft.codec import sign_with_scale
from fedpeft.errors import UpdateError
from fedpeft.updates.update import Update

PLAIN = np.array([1, -2, 3], np.float32)


def compressed() -> Update:
    return Update({}, weight=3, encoded={"b": sign_with_scale(PLAIN), "a": sign_with_scale(-PLAIN)})


@pytest.mark.parametrize(
    "calculate",
    [
        lambda u: u + u,
        lambda u: Update({"a": PLAIN, "b": PLAIN}) + u,
        lambda u: u.scale(2),
        lambda u: u.map(lambda _, array: array),
        lambda u: u.global_norm(),
    ],
)
def test_calculating_with_compressed_values_is_refused(calculate: Callable[[Update], object]) -> None:
    with pytest.raises(UpdateError, match="'a' is encoded"):
        calculate(compressed())


def test_names_are_listed_in_order_whatever_their_form() -> None:
    mixed = Update({"c": PLAIN}, encoded=compressed().encoded)
    assert list(mixed) == ["a", "b", "c"]
    assert mixed.is_finite()


def test_a_name_has_one_form() -> None:
    with pytest.raises(UpdateError, match="both plain and encoded"):
        Update({"a": PLAIN}, encoded=compressed().encoded)


def test_compressed_values_are_frozen() -> None:
    with pytest.raises(TypeError):
        compressed().encoded["a"] = sign_with_scale(PLAIN)  # type: ignore[index]
