"""One state folder, one owner, one version of the tables."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from sqlalchemy import create_engine, inspect, text

from fedpeft.config.run_file import build_run, run_digest, run_json
from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft.ledger import Cohort
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from fedpeft_server.store.database import Database, bring_up
from fedpeft_server.store.schema import VERSION
from tests.server.postgres import Cluster
from tests.server.store.things import checkpoint, cohort, recalled, rows, update


def set_version(folder: Path, version: int) -> None:
    connection = sqlite3.connect(folder / "state.db")
    connection.execute("UPDATE schema_version SET version = ?", (version,))
    connection.commit()
    connection.close()


@pytest.mark.parametrize("url", [None])
def test_commits_reach_the_disk_before_they_return(store: Store) -> None:
    with store.database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL


def test_the_folder_is_its_owners_alone(store: Store) -> None:
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_a_second_server_on_the_folder_is_refused(store: Store) -> None:
    with pytest.raises(StateError, match="in use by another fedpeft server"):
        Store(store.folder)


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    with Store(tmp_path):
        pass
    set_version(tmp_path, VERSION + 1)
    for migrate in (False, True):
        with pytest.raises(StateError, match=f"version {VERSION + 1}, this fedpeft reads version {VERSION}"):
            Store(tmp_path, migrate=migrate)
    set_version(tmp_path, VERSION)
    with Store(tmp_path):  # the refusals hold no lock
        pass


def test_an_older_database_asks_for_its_migration(tmp_path: Path) -> None:
    with Store(tmp_path):
        pass
    set_version(tmp_path, VERSION - 1)
    with pytest.raises(StateError, match="fedpeft server --migrate"):
        Store(tmp_path)


def test_a_migration_runs_every_step_or_none(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'd.db'}", create=True)
    steps = {
        VERSION: ["ALTER TABLE agents ADD COLUMN note TEXT", "UPDATE agents SET note = 'old'"],
        VERSION + 1: ["CREATE TABLE extra (id INTEGER PRIMARY KEY)"],
    }
    broken = {**steps, VERSION + 1: ["CREATE TABLE nonsense ("]}

    def version() -> int:
        with database.reading() as connection:
            return int(connection.exec_driver_sql("SELECT version FROM schema_version").scalar_one())

    with database.writing() as connection:
        connection.exec_driver_sql("INSERT INTO agents VALUES ('ann', 1.0, 2.0)")
    with pytest.raises(StorageError), database.writing() as connection:
        bring_up(connection, VERSION, VERSION + 2, broken)
    assert version() == VERSION
    with database.writing() as connection:
        bring_up(connection, VERSION, VERSION + 2, steps)
    assert version() == VERSION + 2
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT name, note FROM agents").all() == [("ann", "old")]
        assert connection.exec_driver_sql("SELECT count(*) FROM extra").scalar_one() == 0
    database.close()


def test_another_programs_database_and_no_database_are_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE notes (id INTEGER)")
    connection.close()
    with pytest.raises(StateError, match="tables of another program"):
        Database(f"sqlite:///{tmp_path / 'other.db'}")
    (tmp_path / "text.db").write_text("no database at all, whatever it is called " * 50)
    with pytest.raises(StateError, match="no database that can be read"):
        Database(f"sqlite:///{tmp_path / 'text.db'}")


def test_urls_that_cannot_be_used_say_so_without_the_password(tmp_path: Path) -> None:
    for url in ("nonsense", "nosuch://user:secret@host/db", "sqlite+nosuch:///x"):
        with pytest.raises(UsageError, match="database URL cannot be used") as caught:
            Database(url)
        assert "secret" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be used"):
        Database(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder' / 'd.db'}")


# ---- From one version to the next

# As version 1 of fedpeft made it: its tables, written down so that no later change of ours changes them.
VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL PRIMARY KEY);
CREATE TABLE agents (name VARCHAR(200) NOT NULL PRIMARY KEY, first_seen FLOAT NOT NULL,
    last_seen FLOAT NOT NULL);
CREATE TABLE runs (id VARCHAR(64) NOT NULL PRIMARY KEY, place INTEGER NOT NULL UNIQUE,
    name VARCHAR(80) NOT NULL, digest VARCHAR(64) NOT NULL, run_json TEXT NOT NULL,
    status VARCHAR(30) NOT NULL, reason TEXT NOT NULL, submitter VARCHAR(200) NOT NULL,
    submitted_at FLOAT NOT NULL, changed_at FLOAT NOT NULL,
    submission VARCHAR(200) NOT NULL UNIQUE, rules TEXT NOT NULL, roster TEXT,
    adapter_digest VARCHAR(64) NOT NULL);
CREATE TABLE rounds (run VARCHAR(64) NOT NULL REFERENCES runs (id), number INTEGER NOT NULL,
    status VARCHAR(10) NOT NULL, cohort TEXT NOT NULL, opened_at FLOAT NOT NULL, deadline_at FLOAT, row TEXT,
    PRIMARY KEY (run, number));
CREATE TABLE updates (run VARCHAR(64) NOT NULL REFERENCES runs (id), round INTEGER NOT NULL,
    agent VARCHAR(200) NOT NULL, task {blob} NOT NULL, digest VARCHAR(64) NOT NULL, size INTEGER NOT NULL,
    body {blob}, signature {blob} NOT NULL, accepted_at FLOAT NOT NULL, counted BOOLEAN NOT NULL,
    PRIMARY KEY (run, round, agent));
CREATE TABLE checkpoints (run VARCHAR(64) NOT NULL REFERENCES runs (id), round INTEGER NOT NULL,
    digest VARCHAR(64) NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (run, round));
CREATE TABLE budget (run VARCHAR(64) NOT NULL PRIMARY KEY REFERENCES runs (id), ledger TEXT NOT NULL);
CREATE TABLE lines (run VARCHAR(64) NOT NULL REFERENCES runs (id), number INTEGER NOT NULL, at FLOAT NOT NULL,
    text TEXT NOT NULL, PRIMARY KEY (run, number));
CREATE TABLE refusals (run VARCHAR(64) NOT NULL, reason VARCHAR(40) NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (run, reason));
CREATE INDEX updates_by_digest ON updates (digest);
INSERT INTO schema_version VALUES (1);
"""
# Likewise version 2, as what differs from version 1.
TO_VERSION_2 = """
ALTER TABLE rounds ADD COLUMN closed_at FLOAT;
CREATE INDEX updates_waiting ON updates (digest) WHERE body IS NULL AND NOT counted;
UPDATE schema_version SET version = 2;
"""
ON_POSTGRESQL = """
ALTER TABLE updates ALTER COLUMN size TYPE BIGINT;
ALTER TABLE checkpoints ALTER COLUMN size TYPE BIGINT;
""" + "".join(
    f"ALTER TABLE {table} ALTER COLUMN {column} TYPE VARCHAR(100);"
    for table, column in (("runs", "id"), *((each, "run") for each in ("rounds", "updates", "checkpoints")))
)


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_database_goes_on_after_its_migration(tmp_path: Path, url: str | None, version: int) -> None:
    """Its run, its open round and the update that was accepted are there, and the round can be closed."""
    where = url or f"sqlite:///{tmp_path / 'state.db'}"
    run = build_run({"run": {"name": "old", "rounds": 3}}, source="test")
    old = StoredRun(
        "old-1",
        1,
        "old",
        run_json(run),
        run_digest(run),
        Rules(),
        RunStatus.RUNNING,
        "",
        "me",
        1.0,
        1.0,
        -1,
        "",
    )
    engine = create_engine(where)
    script = VERSION_1.format(blob="BLOB" if url is None else "BYTEA")
    with engine.begin() as connection:
        for statement in script.split(";")[:-1]:
            connection.exec_driver_sql(statement)
        given = {
            "run": run_json(run),
            "digest": old.digest,
            "cohort": TypeAdapter(Cohort).dump_json(cohort()).decode(),
        }
        for statement in (
            "INSERT INTO runs VALUES ('old-1', 1, 'old', :digest, :run, 'running', '', 'me', 1, 1, 'one',"
            " '{}', NULL, '')",
            "INSERT INTO rounds VALUES ('old-1', 1, 'open', :cohort, 1, NULL, NULL)",
            "INSERT INTO checkpoints VALUES ('old-1', 0, 'ab', 1000)",
        ):
            connection.execute(text(statement), given)
        sent = update(old, 1, "ann")
        row = vars(sent) | {"accepted_at": 2.0, "counted": False}
        connection.execute(
            text(
                "INSERT INTO updates VALUES (:run, :round, :agent, :task, :digest, :size, :body, :signature,"
                " :accepted_at, :counted)"
            ),
            row,
        )
        further = TO_VERSION_2 + (ON_POSTGRESQL if url is not None else "")
        for statement in further.split(";")[:-1] if version == 2 else ():
            connection.exec_driver_sql(statement)
    engine.dispose()

    (tmp_path / "blobs").mkdir()  # that of round 0 is gone, which nothing asks for
    with pytest.raises(StateError, match=f"is of version {version}, version 3 is needed"):
        Store(tmp_path, url=url)
    with Store(tmp_path, url=url, migrate=True) as store:
        stored = store.runs.get("old-1")
        assert (stored.run, stored.round, stored.submitter, stored.readers) == (run, 0, "me", ())
        assert rows(store, "SELECT name, kept_bytes FROM submitters") == [("me", 1000)]
        assert rows(store, "SELECT kept_bytes FROM runs") == [(1000,)]
        assert rows(store, "SELECT number, action FROM audit") == [(1, "began")]
        assert [each.id for each in store.runs.list(reader="me")] == ["old-1"]
        assert store.runs.list(reader="another") == []
        rounds = store.rounds(stored)
        assert rounds.open_round(1, cohort) == cohort()
        assert list(store.results.recall("old-1", 1, "train")) == [recalled(sent)]
        store.results.accept([update(stored, 1, "bob")])
        rounds.commit(checkpoint(stored, 1))
        ((kept,),) = rows(store, "SELECT kept_bytes FROM submitters")
        assert isinstance(kept, int)
        assert kept > 1000
        assert rows(store, "SELECT count(*) FROM updates WHERE counted") == [(2,)]
        migrated = described(store)
    if url is None:
        with Store(tmp_path / "new") as store:
            assert migrated == described(store), "a migrated database is as a new one"


def test_the_longest_name_and_any_text_fit(store: Store) -> None:
    """PostgreSQL counts characters, and has no text with a NUL in it."""
    name = "r" * 80
    run = build_run({"run": {"name": name, "rounds": 3}}, source="test")
    stored = store.runs.submit(run, Rules(), submission="x" * 128, submitter="me")
    store.rounds(stored).open_round(1, cohort)
    store.results.accept([update(stored, 1, "a" * 200), update(stored, 2, "bob")])
    store.runs.set_status(stored.id, RunStatus.PAUSED, "an agent said \x00 ☃ " + "y" * 5000)
    assert store.runs.get(f"{name}-1").status == RunStatus.PAUSED
    assert store.runs.refusals(stored.id) == {"round-closed": 1}


def described(store: Store) -> dict[str, object]:
    """Columns and indexes of all tables."""
    with store.database.reading() as connection:
        looked = inspect(connection)
        return {
            name: (
                {(column["name"], column["nullable"]) for column in looked.get_columns(name)},
                {index["name"] for index in looked.get_indexes(name)},
            )
            for name in looked.get_table_names()
        }


# ---- PostgreSQL


@pytest.mark.slow
def test_a_second_server_on_the_same_postgresql_is_refused(tmp_path: Path, cluster: Cluster) -> None:
    url = cluster.url("two")
    with (
        Store(tmp_path / "one", url=url),
        pytest.raises(StateError, match="in use by another fedpeft server"),
    ):
        Store(tmp_path / "two", url=url)
    with Store(tmp_path / "two", url=url):  # the first one's lock went with it
        pass


@pytest.mark.slow
def test_a_postgresql_that_goes_and_comes_back(tmp_path: Path, cluster: Cluster) -> None:
    """Cut off as by a power failure: what was acknowledged is there, and the store goes on by itself."""
    run = build_run({"run": {"name": "cut", "rounds": 3}}, source="test")
    with Store(tmp_path, url=cluster.url("cut")) as store:
        stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
        store.rounds(stored).open_round(1, cohort)
        assert store.results.accept([update(stored, 1, "ann")]) == [None]
        cluster.stop("immediate")
        with pytest.raises(StorageError, match="cannot be used"):
            store.results.accept([update(stored, 1, "bob")])
        cluster.start()
        assert store.results.accept([update(stored, 1, "bob")]) == [None]
        assert [row.agent for row in store.results.recall(stored.id, 1, "train")] == ["ann", "bob"]
