"""Label maps and the order of names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.labels import label_map, make_label_map, natural_key, plain_value
from fedpeft.errors import DataError


def test_a_list_numbers_its_labels() -> None:
    labels = label_map(("no", "yes"))
    assert labels.names == ("no", "yes")
    assert [labels.class_id(label, "y", "f") for label in ("yes", "no")] == [1, 0]


def test_a_table_may_merge_labels_and_its_order_does_not_matter() -> None:
    labels = label_map({"bad": 1, "good": 0, "awful": 1})
    assert labels.names == ("good", "bad")
    assert labels.class_id("awful", "y", "f") == 1


def test_text_and_numbers_match() -> None:
    assert label_map((3, 7)).class_id("7", "y", "f") == 1
    assert label_map({"3": 0, "7": 1}).class_id(7, "y", "f") == 1


@pytest.mark.parametrize("labels", [(), ("a", "a"), (3, "3"), {"a": 0, "b": 2}, {"a": 1}, {"a": -1}])
def test_maps_that_are_no_maps(labels: tuple[str | int, ...] | dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"^data\.labels "):
        label_map(labels)


def test_a_label_outside_the_map_names_row_and_label() -> None:
    with pytest.raises(
        DataError, match=r"^f: row 3: field 'y' is 'c', which is outside the label map \(a, b\)"
    ):
        label_map(("a", "b")).class_id("c", "y", "f: row 3")


@given(st.lists(st.integers(0, 500), min_size=1))
def test_default_map_of_integers_is_in_numeric_order(values: list[int]) -> None:
    assert make_label_map(values).names == tuple(str(value) for value in sorted(set(values)))


def test_natural_order() -> None:
    names = ["c10", "c2", "c1", "b", "10", "9", "c01"]
    assert sorted(names, key=natural_key) == ["9", "10", "b", "c01", "c1", "c2", "c10"]


@given(st.lists(st.text(), unique=True))
def test_natural_order_does_not_depend_on_the_order_before(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


@pytest.mark.parametrize(("value", "plain"), [(True, 1), (2.0, 2), (5, 5), ("x", "x")])
def test_plain_values(value: object, plain: str | int) -> None:
    assert plain_value(value, "y", "f") == plain


@pytest.mark.parametrize("value", [None, 1.5, ["a"], float("nan"), float("inf")])
def test_values_that_are_no_labels(value: object) -> None:
    with pytest.raises(DataError, match=r"^f: row 1: field 'y' is .*text or a whole number"):
        plain_value(value, "y", "f: row 1")
