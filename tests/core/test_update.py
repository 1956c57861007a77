"""The vector-space laws that `Update` states, and the fingerprint of arrays."""

from __future__ import annotations

import hashlib
import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.updates.update import Arrays, Update, arrays_digest, check_layout, layout_of
from tests.core.strategies import FLOAT, INT, several

FLOATS, INTEGERS = st.just(FLOAT), st.just(INT)


def equal(left: Update, right: Update) -> bool:
    return left.weight == right.weight and arrays_digest(left.arrays) == arrays_digest(right.arrays)


@given(several(2, 2))
def test_addition_commutes(case: tuple[object, list[Update]]) -> None:
    u, v = case[1]
    # -0.0 + 0.0 and 0.0 + -0.0 are both 0.0, so that bits may be compared
    assert equal(u + v, v + u)
    assert (u + v).weight == u.weight + v.weight


@given(several(3, 3, INTEGERS))
def test_integer_addition_is_associative(case: tuple[object, list[Update]]) -> None:
    u, v, w = case[1]
    assert equal((u + v) + w, u + (v + w))


@given(several(3, 3, FLOATS))
def test_float_addition_is_associative_up_to_rounding(case: tuple[object, list[Update]]) -> None:
    u, v, w = case[1]
    left, right = (u + v) + w, u + (v + w)
    for name in u:
        size = sum(np.abs(part.arrays[name].astype(np.float64)) for part in (u, v, w))
        gap = np.abs(left.arrays[name].astype(np.float64) - right.arrays[name])
        assert np.all(gap <= 4 * 2.0**-24 * size)  # two roundings on each side, half an ulp each


@given(several(2, 2))
def test_addition_is_the_sum_of_the_entries(case: tuple[object, list[Update]]) -> None:
    u, v = case[1]
    total = u + v
    for name in u:
        left, right = u.arrays[name].ravel().tolist(), v.arrays[name].ravel().tolist()
        exact = [Fraction(x) + Fraction(y) for x, y in zip(left, right, strict=True)]
        came = total.arrays[name].ravel().tolist()
        assert all(
            abs(Fraction(c) - e) <= abs(e) * Fraction(1, 2**24) for c, e in zip(came, exact, strict=True)
        )


@given(several(1, 1, FLOATS), st.floats(-8, 8).filter(lambda a: a == 0 or abs(a) > 1e-3))
def test_scaling_scales_the_norm(case: tuple[object, list[Update]], factor: float) -> None:
    (u,) = case[1]
    exact = math.sqrt(sum(Fraction(x) ** 2 for a in u.arrays.values() for x in a.ravel().tolist()))
    assert u.global_norm() == pytest.approx(exact, rel=1e-12, abs=1e-30)
    smallest = 2.0**-149 * 64  # entries may underflow
    assert u.scale(factor).global_norm() == pytest.approx(abs(factor) * exact, rel=1e-6, abs=smallest)
    assert equal(u.scale(1), u)


def test_integers_are_not_scaled() -> None:
    with pytest.raises(UpdateError, match="only added"):
        Update({"a": np.ones(2, np.int64)}).scale(0.5)


def test_an_update_is_frozen_down_to_its_numbers() -> None:
    source = {"b": np.ones(2, np.float32), "a": np.zeros((), np.float32)}
    update = Update(source, metrics={"loss": 1.0})
    assert list(update) == ["a", "b"]
    with pytest.raises(ValueError, match="read-only"):
        update.arrays["b"][0] = 3
    with pytest.raises(TypeError):
        update.arrays["b"] = source["b"]  # type: ignore[index]
    with pytest.raises(TypeError):
        update.metrics["loss"] = 2.0  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        update.weight = 2  # type: ignore[misc]
    source["b"][0] = 1  # the owner's own array stays writable


def test_metrics_do_not_outlive_a_sum() -> None:
    u = Update({"a": np.ones(1, np.float32)}, metrics={"loss": 1.0})
    assert (u + u).metrics == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_entries_are_seen(bad: float) -> None:
    assert Update({"a": np.ones(3, np.float32)}).is_finite()
    assert Update({"a": np.ones(3, np.int64)}).is_finite()
    assert not Update({"a": np.array([1, bad, 0], np.float32)}).is_finite()


@pytest.mark.parametrize(
    ("arrays", "needle"),
    [
        ({}, "lacks 'a'"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(1)}, "unknown array 'b'"),
        ({"a": np.zeros(3, np.float32)}, r"float32\[3\], expected float32\[2\]"),
        ({"a": np.zeros(2, np.float64)}, "float64"),
    ],
)
def test_a_foreign_layout_is_refused(arrays: dict[str, np.ndarray], needle: str) -> None:
    layout = layout_of({"a": np.zeros(2, np.float32)})
    with pytest.raises(UpdateError, match=needle) as caught:
        check_layout(arrays, layout, who="client-7")
    assert "client-7" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_digest_is_of_names_types_shapes_and_little_endian_bytes() -> None:
    array = np.array([[1.5, -2.0]], dtype=np.float32)
    by_hand = hashlib.sha256(b"w\0float32\0(1, 2)\0" + bytes.fromhex("0000c03f000000c0")).hexdigest()
    assert arrays_digest({"w": array}) == by_hand
    assert arrays_digest({"w": array.astype(">f4")}) == by_hand
    assert arrays_digest({"w": np.asfortranarray(array)}) == by_hand
    others: list[Arrays] = [
        {"v": array},
        {"w": array.T.copy()},
        {"w": array.view(np.int32)},
        {"w": -array},
        {},
    ]
    assert arrays_digest({"s": np.ones(())}) != arrays_digest({"s": np.ones(1)})
    assert len({by_hand, *(arrays_digest(other) for other in others)}) == 6


def test_the_digest_does_not_depend_on_insertion_order() -> None:
    one, two = np.ones(2, np.float32), np.zeros(0, np.int64)
    assert arrays_digest({"a": one, "b": two}) == arrays_digest({"b": two, "a": one})
