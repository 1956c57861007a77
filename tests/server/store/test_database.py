"""One state folder, one owner, one version of the tables."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft_server.store import Store
from fedpeft_server.store.database import Database, bring_up
from fedpeft_server.store.schema import VERSION


def set_version(folder: Path, version: int) -> None:
    connection = sqlite3.connect(folder / "state.db")
    connection.execute("UPDATE schema_version SET version = ?", (version,))
    connection.commit()
    connection.close()


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
    database = Database(f"sqlite:///{tmp_path / 'd.db'}")
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
