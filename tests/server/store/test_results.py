"""Updates: durable when accepted, once, only while their round is open, and handed back after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.config.run_file import build_run
from fedpeft_server.store import Rules, Store, StoredRun
from fedpeft_server.store.contracts import ENOUGH
from tests.server.store.things import AGENTS, checkpoint, cohort, recalled, rows, update


def opened(store: Store, stored: StoredRun, round_: int = 1) -> None:
    store.rounds(stored).open_round(round_, cohort)


def test_an_accepted_update_is_there_for_another_process_at_once(store: Store, stored: StoredRun) -> None:
    opened(store, stored)
    assert store.results.accept([update(stored, 1, name) for name in AGENTS]) == [None] * 3
    assert rows(store, "SELECT agent, body, signature FROM updates ORDER BY agent") == [
        (name, f"{name} in round 1".encode(), b"signed by " + name.encode()) for name in AGENTS
    ]


def test_the_same_again_is_accepted_and_kept_once(store: Store, stored: StoredRun) -> None:
    opened(store, stored)
    twice = update(stored, 1, "ann")
    assert store.results.accept([twice, twice]) == [None, None]
    assert store.results.accept([twice]) == [None]
    assert rows(store, "SELECT count(*) FROM updates") == [(1,)]
    assert store.runs.refusals(stored.id) == {}


@pytest.mark.parametrize("together", [True, False])
def test_a_second_different_body_is_refused_and_counted(
    store: Store, stored: StoredRun, together: bool
) -> None:
    opened(store, stored)
    first, second = update(stored, 1, "ann"), update(stored, 1, "ann", b"something else")
    verdicts = (
        store.results.accept([first, second])
        if together
        else [*store.results.accept([first]), *store.results.accept([second])]
    )
    assert verdicts[0] is None
    assert "another result" in str(verdicts[1])
    assert store.runs.refusals(stored.id) == {"different-result": 1}
    assert store.results.recall(stored.id, 1, "train")[0].body == b"ann in round 1"


def test_an_over_selected_round_takes_as_many_as_there_are_places(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        run = build_run({"run": {"name": "small", "rounds": 3}}, source="test")
        stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
        store.rounds(stored).open_round(1, lambda: replace(cohort(), places=2))
        ann, bob, eve = (update(stored, 1, name) for name in AGENTS)
        assert store.results.accept([eve, ann, bob]) == [None, None, ENOUGH], "as they came"
        assert store.results.accept([bob, ann]) == [ENOUGH, None], "ann's acknowledgement was lost"
    with Store(tmp_path / "state") as store:  # as after a kill: what is durable has decided
        assert store.results.accept([bob]) == [ENOUGH]
        assert [arrival.agent for arrival in store.results.recall(stored.id, 1, "train")] == ["ann", "eve"]
        store.results.free_place(stored.id, 1, "ann")
        store.results.free_place(stored.id, 1, "ann")
        assert store.results.accept([bob]) == [None], "ann's update was unsound: its place is free, once"
        large = update(stored, 1, "dan", b"x" * 1000)
        store.blobs.put(b"x" * 1000)
        assert store.blobs.has(large.digest)
        assert store.results.accept([replace(large, body=None)]) == [ENOUGH]
        assert not store.blobs.has(large.digest), "its agent has it still"
        assert store.runs.refusals(stored.id) == {"spare": 4}
        store.rounds(stored).commit(checkpoint(stored, 1))
        store.rounds(stored).open_round(2, cohort)
        assert store.results.accept([update(stored, 2, name) for name in AGENTS]) == [None] * 3


def test_only_the_open_round_of_a_run_that_exists_takes_updates(store: Store, stored: StoredRun) -> None:
    early = store.results.accept([update(stored, 1, "ann")])
    opened(store, stored)
    others = [
        update(stored, 2, "ann"),
        update(stored, 0, "ann"),
        replace(update(stored, 1, "ann"), run="nobody's"),
    ]
    store.results.accept([update(stored, 1, "bob")])
    store.rounds(stored).commit(checkpoint(stored, 1))
    late = store.results.accept([update(stored, 1, "ann")])
    again = store.results.accept([update(stored, 1, "bob")])
    assert again == [None], "its acknowledgement was lost; it was counted, so it need not be kept"
    for verdict in (*early, *store.results.accept(others[:2]), *late):
        assert "is closed" in str(verdict)
    assert "no such run" in str(store.results.accept(others[2:])[0])
    assert rows(store, "SELECT agent FROM updates") == [("bob",)]
    assert store.runs.refusals(stored.id) == {"round-closed": 4}


def test_greetings_are_taken_and_not_kept(store: Store, stored: StoredRun) -> None:
    hello = update(stored, 0, "ann", kind="query.hello")
    changed = update(stored, 0, "ann", b"more rows now", kind="query.hello")
    assert store.results.accept([hello, changed]) == [None, None]
    assert store.results.recall(stored.id, 0, "query.hello") == []


def test_a_large_update_lies_in_a_blob_until_its_round_is_closed(store: Store, stored: StoredRun) -> None:
    opened(store, stored)
    whole = update(stored, 1, "ann", b"x" * 100_000)
    large = replace(whole, body=None)
    assert "not there" in str(store.results.accept([large])[0])
    assert store.blobs.put(b"x" * 100_000) == whole.digest
    assert store.results.accept([large]) == [None]
    assert store.results.recall(stored.id, 1, "train") == [recalled(large)]
    store.blobs.collect(set(), older_than_s=3600)
    assert store.blobs.has(whole.digest)
    store.rounds(stored).commit(checkpoint(stored, 1))
    assert not store.blobs.has(whole.digest)


def test_after_a_restart_the_open_rounds_updates_are_handed_back(tmp_path: Path) -> None:
    from fedpeft.config.run_file import build_run
    from fedpeft_server.store import Rules

    run = build_run({"run": {"name": "small", "rounds": 3}}, source="test")
    with Store(tmp_path) as store:
        stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
        opened(store, stored)
        sent = [update(stored, 1, name) for name in ("ann", "bob")]
        store.results.accept(sent)
    with Store(tmp_path) as store:
        assert list(store.results.recall(stored.id, 1, "train")) == list(map(recalled, sent))
        store.rounds(stored).commit(checkpoint(stored, 1))
        assert store.results.recall(stored.id, 1, "train") == []


def test_a_thousand_updates_of_a_kilobyte_are_durable_within_a_second(
    store: Store, stored: StoredRun
) -> None:
    """In batches of 50, far smaller than those that a loaded server makes."""
    import os
    import time

    names = tuple(f"agent-{number}" for number in range(1000))
    store.rounds(stored).open_round(1, lambda: cohort(names))
    sent = [update(stored, 1, name, os.urandom(1024)) for name in names]
    started = time.perf_counter()
    for begin in range(0, 1000, 50):
        assert store.results.accept(sent[begin : begin + 50]) == [None] * 50
    took = time.perf_counter() - started
    assert len(store.results.recall(stored.id, 1, "train")) == 1000
    assert took < 5.0, f"{took:.2f} s; alone on two cores it takes 0.3 s"
