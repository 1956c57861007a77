"""Rounds: opened once, closed in one transaction, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import StateError, StorageError
from fedpeft.ledger import Cohort
from fedpeft_server.runs.control import Paused
from fedpeft_server.store import Rules, Store, StoredRun
from tests.server.store.things import checkpoint, cohort, rows, update


def never() -> Cohort:
    raise AssertionError("the cohort is drawn once")


def test_the_cohort_of_a_round_stays_what_was_drawn(store: Store, stored: StoredRun) -> None:
    assert store.rounds(stored).open_round(1, cohort) == cohort()
    assert store.rounds(stored).open_round(1, never) == cohort()


def test_a_closed_round_is_not_opened_again(store: Store, stored: StoredRun) -> None:
    rounds = store.rounds(stored)
    rounds.open_round(1, cohort)
    rounds.commit(checkpoint(stored, 1))
    with pytest.raises(StateError, match="closed already"):
        rounds.open_round(1, never)


def test_a_commit_holds_checkpoint_row_and_counted_updates(store: Store, stored: StoredRun) -> None:
    rounds = store.rounds(stored)
    assert rounds.latest() is None
    rounds.commit(checkpoint(stored, 0))
    rounds.open_round(1, cohort)
    store.results.accept([update(stored, 1, "ann")])
    rounds.commit(checkpoint(stored, 1))
    last = rounds.latest()
    assert last is not None
    np.testing.assert_array_equal(last.state["a"], np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(last.strategy["m"], [0.0, 1.0])
    assert json.loads(rounds.last_row() or "")["round"] == 1
    assert rows(store, "SELECT counted, body FROM updates") == [(True, None)]
    ((seconds,),) = rows(store, "SELECT closed_at - opened_at FROM rounds WHERE number = 1")
    assert 0 <= float(str(seconds)) < 60
    assert [json.loads(line.text)["round"] for line in store.runs.lines(stored.id)] == [0, 1]
    assert store.runs.get(stored.id).round == 1


def test_a_round_is_committed_once(store: Store, stored: StoredRun) -> None:
    rounds = store.rounds(stored)
    rounds.commit(checkpoint(stored, 0))
    with pytest.raises(StateError, match="refused a statement"):
        rounds.commit(checkpoint(stored, 0))
    assert len(store.runs.lines(stored.id)) == 1


def test_old_checkpoints_go_as_the_run_file_says(store: Store) -> None:
    from fedpeft.config.run_file import build_run

    tables = {"run": {"name": "short", "rounds": 5}, "output": {"keep_checkpoints": 2}}
    stored = store.runs.submit(build_run(tables, source="test"), Rules(), submission="x", submitter="me")
    rounds = store.rounds(stored)
    for number in range(5):
        rounds.commit(checkpoint(stored, number))
    assert sorted(rounds.contents()) == [3, 4]
    assert len(list((store.folder / "blobs").glob("*/*"))) == 2


def test_a_gate_that_is_shut_keeps_rounds_from_opening_and_closing(store: Store, stored: StoredRun) -> None:
    def shut() -> None:
        raise Paused("not now")

    rounds = store.rounds(stored, shut)
    for step in (lambda: rounds.open_round(1, cohort), lambda: rounds.commit(checkpoint(stored, 0))):
        with pytest.raises(Paused):
            step()
    assert rounds.latest() is None


def test_a_half_written_or_damaged_checkpoint_is_never_taken(store: Store, stored: StoredRun) -> None:
    rounds = store.rounds(stored)
    rounds.commit(checkpoint(stored, 0))
    (blob,) = (store.folder / "blobs").glob("*/*")
    half = blob.parent / ".partial-left-by-a-crash"
    half.write_bytes(blob.read_bytes()[:100])
    assert rounds.latest() is not None
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(bytes(content))
    with pytest.raises(StateError, match="corrupt; restore"):
        rounds.latest()
    blob.unlink()
    with pytest.raises(StateError, match="missing; restore"):
        rounds.latest()


def test_spent_privacy_is_kept_apart_from_rounds(store: Store, stored: StoredRun) -> None:
    rounds = store.rounds(stored)
    assert rounds.read_spent_ledger() is None
    rounds.commit_spent('{"round": 1}')
    rounds.commit_spent('{"round": 2}')
    assert store.rounds(stored).read_spent_ledger() == '{"round": 2}'


def test_a_locked_database_commits_nothing_and_says_so(store: Store, stored: StoredRun) -> None:
    rounds = store.rounds(stored)
    rounds.open_round(1, cohort)
    with store.database.writing(), pytest.raises(StorageError, match=r"locked by another process"):
        store.results.accept([update(stored, 1, "ann")])
    assert store.results.accept([update(stored, 1, "ann")]) == [None]


def test_a_full_disk_commits_nothing_and_says_so(tmp_path: Path) -> None:
    """A child that may write no file beyond 200 KB: the limit that a full disk is, without a disk."""
    import subprocess
    import sys

    script = """
import resource, signal, sys
from pathlib import Path
from fedpeft.errors import StorageError
from fedpeft.config.run_file import build_run
from fedpeft_server.store import Rules, Store
from tests.server.store.things import checkpoint, cohort, update
with Store(Path(sys.argv[1])) as store:
    run = build_run({"run": {"name": "small", "rounds": 3}}, source="test")
    stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
    rounds = store.rounds(stored)
    rounds.commit(checkpoint(stored, 0))
    rounds.open_round(1, cohort)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    refused = 0
    for attempt in (
        lambda: store.results.accept([update(stored, 1, "ann", b"x" * 400_000)]),
        lambda: store.blobs.put(b"y" * 400_000),
    ):
        try:
            attempt()
        except StorageError as error:
            refused += 1
            print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert refused == 2
    assert store.results.recall(stored.id, 1, "train") == []
    assert store.results.accept([update(stored, 1, "ann", b"x" * 400_000)]) == [None]
    rounds.commit(checkpoint(stored, 1))
    assert rounds.latest().round == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
