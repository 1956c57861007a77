"""Dealing: nobody's row is dealt twice, each kind has the shape it promises, seeds decide."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config.sections import PartitionerSection
from fedpeft.data.partition import Dealt, deal_by_column, deal_by_file, deal_evenly
from fedpeft.errors import DataError

LABELS = [str(i % 5) for i in range(400)]
BY_COLUMN: dict[str, dict[str, Any]] = {
    "dirichlet": {"alpha": 0.3},
    "pathological": {"classes_per_client": 2},
    "shard": {"shards_per_client": 2},
}
EVENLY = ("iid", "linear", "square", "exponential")


def spec(kind: str, **keys: Any) -> PartitionerSection:
    return PartitionerSection.model_validate({"kind": kind, **keys})


def deal(kind: str, seed: int = 0, clients: int = 4, by: list[str] | None = None) -> Dealt:
    if kind in EVENLY:
        return deal_evenly(len(LABELS), spec(kind, clients=clients), seed)
    return deal_by_column(by or LABELS, spec(kind, clients=clients, by="y", **BY_COLUMN[kind]), seed)


def rows_of(dealt: Dealt) -> list[list[int]]:
    return [indices.tolist() for _, indices in dealt.groups]


@pytest.mark.parametrize("kind", [*EVENLY, *BY_COLUMN])
def test_rows_are_dealt_once_and_the_seed_decides(kind: str) -> None:
    rows = rows_of(deal(kind))
    dealt = [row for client in rows for row in client]
    assert len(set(dealt)) == len(dealt)
    assert set(dealt) <= set(range(len(LABELS)))
    assert all(client == sorted(client) for client in rows)
    assert rows == rows_of(deal(kind))
    assert rows != rows_of(deal(kind, seed=1))
    assert [name for name, _ in deal(kind).groups] == [f"client-{i}" for i in range(4)]


@pytest.mark.parametrize("kind", [*EVENLY, "dirichlet"])
def test_all_rows_are_dealt(kind: str) -> None:
    assert sum(len(client) for client in rows_of(deal(kind))) == len(LABELS)


def test_sizes_follow_the_kind() -> None:
    assert [len(client) for client in rows_of(deal("iid"))] == [100] * 4
    assert [len(client) for client in rows_of(deal("linear"))] == [40, 80, 120, 160]
    sizes = [len(client) for client in rows_of(deal("square"))]
    np.testing.assert_allclose(sizes, [400 * k * k / 30 for k in (1, 2, 3, 4)], atol=3)
    sizes = [len(client) for client in rows_of(deal("exponential"))]
    weights = np.exp([1, 2, 3, 4])
    np.testing.assert_allclose(sizes, 400 * weights / weights.sum(), atol=3)


def test_even_pieces_are_shuffled() -> None:
    assert rows_of(deal("iid"))[0] != list(range(100))


def test_pathological_clients_hold_so_many_classes() -> None:
    for client in rows_of(deal("pathological", clients=5)):
        assert len({LABELS[row] for row in client}) == 2


def test_shards_are_cut_from_rows_sorted_by_class() -> None:
    by = [str(i % 8) for i in range(400)]  # 8 classes of 50 rows = 8 shards of 50 rows
    for client in rows_of(deal("shard", by=by)):
        assert sorted(Counter(by[row] for row in client).values()) == [50, 50]


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_who_gets_which_classes_is_drawn_from_the_seed(kind: str) -> None:
    def classes(seed: int) -> list[Counter[str]]:
        return [Counter(LABELS[row] for row in client) for client in rows_of(deal(kind, seed=seed))]

    assert classes(0) != classes(1)


def test_smaller_alpha_skews_more() -> None:
    def spread(alpha: float) -> float:
        keys = {"clients": 4, "by": "y", "alpha": alpha}
        groups = [rows_of(deal_by_column(LABELS, spec("dirichlet", **keys), seed)) for seed in range(8)]
        counts = [
            [Counter(LABELS[row] for row in client)[y] for y in "01234"] for g in groups for client in g
        ]
        return float(np.std(counts))

    assert spread(0.1) > 2 * spread(100.0)


def deal_or_refusal(kind: str, clients: int, by: list[str]) -> Dealt | str:
    try:
        return deal(kind, clients=clients, by=by)
    except DataError as error:
        return str(error)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(BY_COLUMN)),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=30),
    st.integers(1, 5),
)
def test_any_column_is_dealt_soundly_or_refused(kind: str, by: list[str], clients: int) -> None:
    result = deal_or_refusal(kind, clients, by)
    if isinstance(result, str):
        assert "\n" not in result
        return
    rows = rows_of(result)
    dealt = [row for client in rows for row in client]
    assert len(rows) == clients
    assert min(len(client) for client in rows) >= 1
    assert len(set(dealt)) == len(dealt)
    assert set(dealt) <= set(range(len(by)))


@given(st.lists(st.integers(-2, 12), min_size=1, max_size=40), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_natural_clients_are_the_column(by: list[int], limit: int) -> None:
    dealt = deal_by_column(by, spec("natural", by="who"), 0)
    assert {int(name): rows.tolist() for name, rows in dealt.groups} == {
        value: [i for i, other in enumerate(by) if other == value] for value in set(by)
    }
    few = deal_by_column(by, spec("natural", by="who", clients=limit), 0)
    sizes = sorted((by.count(value) for value in set(by)), reverse=True)
    assert sorted((len(rows) for _, rows in few.groups), reverse=True) == sizes[:limit]
    assert few.left_out == max(0, len(sizes) - limit)


def test_natural_clients_come_in_natural_order_without_the_excluded() -> None:
    by = ["c10"] * 3 + ["c2"] * 3 + ["c1"] * 2 + ["test"] * 9 + ["c3"]
    dealt = deal_by_column(by, spec("natural", by="who", exclude=["test"], min_rows=2), 0)
    assert [(name, rows.tolist()) for name, rows in dealt.groups] == [
        ("c1", [6, 7]),
        ("c2", [3, 4, 5]),
        ("c10", [0, 1, 2]),
    ]
    assert dealt.left_out == 1


def test_excluded_numbers_match_text() -> None:
    dealt = deal_by_column(["-1", "0", "1"], spec("natural", by="who", exclude=[-1]), 0)
    assert [name for name, _ in dealt.groups] == ["0", "1"]


def owners(*names: str) -> list[tuple[str, str]]:
    """Files that are a client each."""
    return [(name, f"{name}.jsonl") for name in names]


def test_files_of_one_owner_are_one_client() -> None:
    dealt = deal_by_file([0, 1, 2, 2], [("a", "a"), ("b", "b"), ("a", "a")], spec("files"))
    assert [(name, rows.tolist()) for name, rows in dealt.groups] == [("a", [0, 2, 3]), ("b", [1])]


def test_files_are_clients() -> None:
    dealt = deal_by_file([0, 0, 2, 2, 2], owners("t10", "empty", "t9"), spec("files", min_rows=2))
    assert [(name, rows.tolist()) for name, rows in dealt.groups] == [("t9", [2, 3, 4]), ("t10", [0, 1])]
    assert dealt.left_out == 1


def test_progress_bars_and_warnings_of_the_library_stay_silent(capfd: pytest.CaptureFixture[str]) -> None:
    deal_by_column(LABELS, spec("natural", by="y"), 0)
    deal("dirichlet", clients=8)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deal_by_file([0], owners("a", "b"), spec("files")), "client b has no rows"),
        (
            lambda: deal_by_file([0, 1], [("a", "1"), ("a", "2")], spec("files")),
            "two files would both be client a",
        ),
        (
            lambda: deal_evenly(3, spec("iid", clients=4), 0),
            "3 training rows are too few for 4 clients of at least 1",
        ),
        (lambda: deal_evenly(0, spec("iid", clients=4), 0), "no training rows are left"),
        (
            lambda: deal_evenly(9, spec("exponential", clients=4), 0),
            "partitioner 'exponential' cannot deal 9 rows",
        ),
        (lambda: deal_evenly(9, spec("linear", clients=3, min_rows=2), 0), "client-0 of 3 got 1 rows"),
        (lambda: deal_by_column(["a"] * 9, spec("natural", by="y", min_rows=10), 0), "no client has 10 rows"),
        (
            lambda: deal_by_column(["a"], spec("natural", by="y", exclude=["a"]), 0),
            "no training rows are left",
        ),
        (
            lambda: deal_by_column(LABELS, spec("pathological", clients=2, by="y", classes_per_client=6), 0),
            "partitioner 'pathological' cannot deal",
        ),
        (
            lambda: deal_by_column(LABELS, spec("dirichlet", clients=9, by="y", alpha=0.01, min_rows=40), 0),
            "partitioner 'dirichlet' cannot deal 400 rows to 9 clients",
        ),
        (
            lambda: deal_by_column(LABELS, spec("shard", clients=200, by="y", shards_per_client=3), 0),
            "(fewer rows than shards)",
        ),
    ],
)
def test_what_cannot_be_dealt(call: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
