"""What one submitter may take of a server, and that a submit costs the same however many runs there are."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import LimitError, UsageError
from fedpeft_server.ops.server_settings import ServerSettings
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import EVERYONE, Quota, Rules, RunStatus, Store, StoredRun
from tests.server.in_memory_grid import standins
from tests.server.store.things import checkpoint, cohort, rows, update
from tests.server.test_supervisor import LONG_S, Daemon, tables

QUOTA = Quota(runs=3, rounds=20, kept_bytes=10_000)


def small(name: str = "small", rounds: int = 3) -> RunConfig:
    return build_run({"run": {"name": name, "rounds": rounds}}, source="test")


def submitted(store: Store, name: str, submitter: str = "ada", rounds: int = 3) -> StoredRun:
    run = small(name, rounds)
    return store.runs.submit(run, Rules(), submission=name, submitter=submitter, quota=QUOTA)


def test_a_submitter_has_so_many_runs_at_a_time_and_no_more(store: Store) -> None:
    for number in range(3):
        submitted(store, f"run-{number}")
    with pytest.raises(LimitError, match="3 runs of 'ada' have not ended, which is the most"):
        submitted(store, "run-3")
    assert submitted(store, "run-2").id == "run-2-3", "what was submitted before is no further run"
    assert submitted(store, "run-3", "bob").id == "run-3-4", "another's share is another's"
    store.runs.set_status("run-0-1", RunStatus.STOPPED, "enough")
    assert submitted(store, "run-3").id == "run-3-5"


def test_rounds_are_counted_over_the_runs_that_have_not_ended(store: Store) -> None:
    submitted(store, "long", rounds=15)
    with pytest.raises(LimitError, match="has 6 rounds and those of 'ada' that have not ended 15; 20"):
        submitted(store, "other", rounds=6)
    submitted(store, "other", rounds=5)
    with pytest.raises(LimitError, match="the run has 21 rounds"):
        submitted(store, "alone", "bob", rounds=21)


def test_bytes_are_counted_as_rounds_commit_and_freed_by_removing_files(store: Store) -> None:
    stored = submitted(store, "small")
    rounds = store.rounds(stored)
    rounds.commit(checkpoint(stored, 0))
    rounds.open_round(1, cohort)
    store.results.accept([update(stored, 1, "ann", b"x" * 5000)])
    ((of_round_0,),) = rows(store, "SELECT kept_bytes FROM submitters WHERE name = 'ada'")
    assert of_round_0 == rows(store, "SELECT sum(size) FROM checkpoints")[0][0]
    folder = store.run_folder(stored.id)
    folder.mkdir(parents=True)
    (folder / "adapter").write_bytes(b"y" * 6000)
    store.runs.set_status(stored.id, RunStatus.STOPPED, "enough")
    store.measure(stored.id)
    ((kept,),) = rows(store, "SELECT kept_bytes FROM submitters WHERE name = 'ada'")
    assert kept == int(str(of_round_0)) + 5000 + 6000
    with pytest.raises(LimitError, match=r"the runs of 'ada' keep .* fedpeft run remove RUN"):
        submitted(store, "further")
    submitted(store, "further", "bob")

    (digest,) = (row[0] for row in rows(store, "SELECT digest FROM checkpoints"))
    store.remove_files(stored.id)
    assert rows(store, "SELECT kept_bytes FROM submitters WHERE name = 'ada'") == [(0,)]
    assert not folder.exists()
    assert not store.blobs.has(str(digest))
    assert store.runs.get(stored.id).status == RunStatus.STOPPED
    assert len(store.runs.lines(stored.id)) == 2, "its log stays"
    submitted(store, "further")


def test_what_is_kept_goes_down_with_the_checkpoints_that_go(store: Store) -> None:
    run = build_run({"run": {"name": "few", "rounds": 9}, "output": {"keep_checkpoints": 2}}, source="test")
    stored = store.runs.submit(run, Rules(), submission="few", submitter="ada")
    rounds = store.rounds(stored)
    for number in range(5):
        if number:
            rounds.open_round(number, cohort)
        rounds.commit(checkpoint(stored, number))
        assert rows(store, "SELECT kept_bytes FROM runs") == rows(store, "SELECT sum(size) FROM checkpoints")
    assert rows(store, "SELECT kept_bytes FROM submitters") == rows(store, "SELECT kept_bytes FROM runs")


def test_a_run_whose_submitter_keeps_too_much_is_stopped_and_its_adapter_written(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        daemon = Daemon(store)
        daemon.supervisor = Supervisor(store, daemon._open, quota=Quota(kept_bytes=1))
        stored = daemon.ended(daemon.submit(tables()).id)
        assert (stored.status, stored.round) == (RunStatus.STOPPED, 0)
        assert "the runs of 'me' keep" in stored.reason
        assert (store.run_folder(stored.id) / "adapter" / "adapter_model.safetensors").is_file()
        with pytest.raises(LimitError, match="fedpeft run remove"):
            daemon.submit(tables(quorum=0.9), "two")
        assert daemon.submit(tables(), "one").id == stored.id
        assert daemon.supervisor.drain(LONG_S)


def test_a_quota_is_asked_before_a_run_file_is_checked(tmp_path: Path) -> None:
    """A check takes seconds, and whoever has its share gets none."""
    with Store(tmp_path / "state") as store:
        supervisor = Supervisor(store, standins(store, []), quota=Quota(rounds=1))
        bad: dict[str, Any] = tables() | {"peft": {"method": "nonsense"}}
        with pytest.raises(LimitError, match="the run has 2 rounds"):
            supervisor.submit(
                build_run(bad, source="test"), Rules(), submission="a", submitter="ada", readers=()
            )


def test_the_settings_say_how_much(tmp_path: Path) -> None:
    assert ServerSettings().quota() == Quota()
    limits = {"submitter_runs": 2, "submitter_rounds": 7, "submitter_gib": 3}
    assert ServerSettings.model_validate({"limits": limits}).quota() == Quota(2, 7, 3 << 30)


# ---- Ownership in the store


def test_a_submission_is_its_submitters(store: Store) -> None:
    """Another's submission of the same name and run file is another run, and tells nothing of the first."""
    mine = store.runs.submit(small(), Rules(), submission="one", submitter="ada")
    theirs = store.runs.submit(small(), Rules(), submission="one", submitter="bob")
    assert (mine.id, theirs.id) == ("small-1", "small-2")
    assert store.runs.find_submission(small(), submission="one", submitter="eve") is None
    with pytest.raises(UsageError, match="came before with another run file"):
        store.runs.submit(small(rounds=4), Rules(), submission="one", submitter="bob")
    long = "x" * 200
    first = store.runs.submit(small(), Rules(), submission=long + "1", submitter="ada")
    assert store.runs.submit(small(), Rules(), submission=long + "2", submitter="ada").id != first.id


def test_a_submitter_is_shown_its_own_runs_and_those_it_was_named_for(store: Store) -> None:
    named: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("ada", ()),
        ("ada", ("bob", "eve")),
        ("bob", (EVERYONE,)),
    )
    for number, (submitter, readers) in enumerate(named):
        store.runs.submit(small(), Rules(), submission=str(number), submitter=submitter, readers=readers)

    def seen(reader: str | None, limit: int = 0) -> list[str]:
        return [stored.id for stored in store.runs.list(reader=reader, limit=limit)]

    assert seen(None) == ["small-3", "small-2", "small-1"]
    assert seen("ada") == ["small-3", "small-2", "small-1"]
    assert seen("bob") == ["small-3", "small-2"]
    assert seen("zoe") == ["small-3"]
    assert seen("ada", 2) == ["small-3", "small-2"]
    assert store.runs.get("small-2").readers == ("bob", "eve")
    assert seen(EVERYONE) == ["small-3"], "a reader's mark is nobody's name"


# ---- The cost of a submit


@contextmanager
def statements(store: Store) -> Iterator[list[tuple[str, Any]]]:
    """What is asked of the database while the block lasts, with parameters."""
    seen: list[tuple[str, Any]] = []

    def note(_c: Any, _u: Any, statement: str, parameters: Any, _x: Any, _many: bool) -> None:
        seen.append((statement, parameters))

    event.listen(store.database._engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(store.database._engine, "before_cursor_execute", note)


def scans(folder: Path, asked: list[tuple[str, Any]]) -> list[str]:
    """Statements for which SQLite would read a table or an index from end to end."""
    found = []
    with closing(sqlite3.connect(folder / "state.db")) as database:
        for statement, parameters in asked:
            if not statement.startswith(("SELECT", "UPDATE", "INSERT", "DELETE")):
                continue
            plan = database.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            steps = " / ".join(str(step[3]) for step in plan)
            # The first row in the order of a key is no scan, though SQLite calls it one.
            first = "WHERE" not in statement and "LIMIT" in statement and "TEMP B-TREE" not in steps
            one_row = "FROM schema_version" in statement
            if "SCAN" in steps and not (first or one_row) and "CONSTANT" not in steps:
                found.append(f"{statement}: {steps}")
    return found


def test_a_submit_costs_the_same_however_many_runs_there_are(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:

        def asked(number: int) -> list[tuple[str, Any]]:
            with statements(store) as seen:
                store.runs.check_quota("ada", small(), Quota())
                store.runs.find_submission(small(), submission=f"next-{number}", submitter="ada")
                store.runs.submit(
                    small(),
                    Rules(),
                    submission=f"next-{number}",
                    submitter="ada",
                    readers=("bob",),
                    quota=Quota(),
                )
                store.runs.next_queued(without=["another"], digests=["ab"])
            return seen

        few = asked(0)
        for number in range(300):
            stored = store.runs.submit(small(), Rules(), submission=str(number), submitter="ada")
            store.runs.set_status(stored.id, RunStatus.STOPPED if number % 2 else RunStatus.FINISHED)
        many = asked(1)
        assert [statement for statement, _ in few] == [statement for statement, _ in many]
        assert len(few) < 40
        assert scans(store.folder, many) == []
        every = "SELECT * FROM runs ORDER BY place"
        assert scans(store.folder, [(every, ())]) != [], "reading all of them is found"
