"""Updates of buffered rounds: taken while their state is young enough, counted one by one, in their order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.errors import StateError
from fedpeft.ledger import Checkpoint
from fedpeft.ledger.records import ClientOutcome
from fedpeft_server.store import Rules, Store, StoredRun
from tests.server.store.things import checkpoint, cohort, rows, update


@pytest.fixture
def buffered(store: Store) -> StoredRun:
    federation = {"mode": "buffered", "buffer": {"size": 2, "concurrency": 3, "max_staleness": 2}}
    run = build_run({"run": {"name": "small", "rounds": 9}, "federation": federation}, source="test")
    return store.runs.submit(run, Rules(), submission="buffered", submitter="me")


def closed(store: Store, stored: StoredRun, number: int, folded: dict[str, int]) -> None:
    """Open and commit a round whose row names these clients, with the staleness of each."""
    outcomes = tuple(
        ClientOutcome(client=name, status="folded", staleness=age) for name, age in folded.items()
    )
    made = checkpoint(stored, number)
    journal = store.rounds(stored)
    if number:
        journal.open_round(number, cohort)
    journal.commit(
        Checkpoint(made.run_digest, number, made.state, made.row.model_copy(update={"outcomes": outcomes}))
    )


def test_old_work_is_taken_up_to_the_bound_also_between_two_rounds(store: Store, buffered: StoredRun) -> None:
    closed(store, buffered, 0, {})
    for number in (1, 2, 3):
        closed(store, buffered, number, {})
    # Nothing is open: what round 4 will take is taken, and that of round 1 is too old for it.
    came = [update(buffered, number, f"agent-{number}") for number in (1, 2, 3, 4)]
    verdicts = store.results.accept(came)
    assert [verdict is None for verdict in verdicts] == [False, True, True, False]
    store.rounds(buffered).open_round(4, cohort)
    assert store.results.accept([came[3], update(buffered, 5, "eve")]) == [None, verdicts[0]]
    assert store.runs.refusals(buffered.id) == {"round-closed": 3}


def test_a_commit_counts_the_updates_that_its_row_names_and_no_others(
    store: Store, buffered: StoredRun
) -> None:
    closed(store, buffered, 0, {})
    closed(store, buffered, 1, {})
    journal = store.rounds(buffered)
    journal.open_round(2, cohort)
    for round_, name in ((1, "bob"), (2, "ann"), (1, "eve"), (2, "bob")):
        assert store.results.accept([update(buffered, round_, name)]) == [None]
    assert journal.list_uncommitted() == [("bob", 1), ("ann", 2), ("eve", 1), ("bob", 2)]
    closed(store, buffered, 2, {"ann": 0, "bob": 1})
    assert journal.list_uncommitted() == [("eve", 1), ("bob", 2)]
    kept = rows(store, "SELECT agent, round FROM updates WHERE body IS NOT NULL ORDER BY agent")
    assert kept == [("bob", 2), ("eve", 1)]
    again = update(buffered, 1, "bob")
    assert store.results.accept([again, replace(again, digest="0" * 64)])[0] is None
    assert journal.list_uncommitted() == [("eve", 1), ("bob", 2)], "what was counted is not taken twice"


def test_past_checkpoints_are_there_while_they_are_kept(store: Store, buffered: StoredRun) -> None:
    for number in range(3):
        closed(store, buffered, number, {})
    journal = store.rounds(buffered)
    assert [float(journal.checkpoint(number).state["a"][0, 0]) for number in range(3)] == [0.0, 1.0, 2.0]
    with pytest.raises(StateError, match=r"round 7 of run .* is not kept"):
        journal.checkpoint(7)
