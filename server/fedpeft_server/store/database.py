"""Opening the database: any SQLAlchemy URL, a version that fits, and errors as one line of ours."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft_server.store.schema import METADATA, MIGRATIONS, VERSION, schema_version

BUSY_S = 5.0
_LOCKED = ("locked", "busy", "lock timeout")
_FULL = ("disk is full", "no space left", "disk i/o error", "could not extend file")


class Database:
    """Transactions on one database; safe to use from several threads.

    Raises:
        UsageError: the URL names no database that is installed.
        StateError: it is of another version, or no database at all.
        StorageError: it cannot be reached or written.
    """

    def __init__(self, url: str, *, migrate: bool = False, busy_s: float = BUSY_S) -> None:
        self._name, self._engine = _engine(url, busy_s)
        self._writer = self._engine.execution_options(begin="IMMEDIATE")
        with self._named():
            _prepare(self, migrate=migrate)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._named(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is durable when the block ends, or did not happen."""
        with self._named(), self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise _one_line(self._name, error) from error


def _engine(url: str, busy_s: float) -> tuple[str, Engine]:
    """The engine, and the database's name without its password."""
    try:
        engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise UsageError(
            f"the database URL cannot be used ({_first_line(error)}); give one like"
            " sqlite:////var/lib/fedpeft/state.db, or install the driver that it names"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", functools.partial(_set_up_sqlite, busy_s))
        event.listen(engine, "begin", _begin_sqlite)
    return engine.url.render_as_string(hide_password=True), engine


def _set_up_sqlite(busy_s: float, connection: sqlite3.Connection, _record: object) -> None:
    """One writer beside many readers (WAL), and a commit returns when the disk has it (FULL)."""
    connection.isolation_level = None  # we begin transactions ourselves
    for pragma in (
        f"busy_timeout={int(busy_s * 1000)}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: one that starts as a reader could fail at its first write."""
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', '')}".strip())


def _prepare(database: Database, *, migrate: bool) -> None:
    """Make the tables, or bring them up to date, or refuse."""
    with database.writing() as connection:
        names = set(inspect(connection).get_table_names())
        if not names:
            METADATA.create_all(connection)
            connection.execute(schema_version.insert().values(version=VERSION))
            return
        if schema_version.name not in names:
            raise StateError("the database holds tables of another program; give fedpeft one of its own")
        version = connection.execute(select(schema_version.c.version)).scalar_one()
        bring_up(connection, int(version), VERSION, MIGRATIONS if migrate else {})


def bring_up(
    connection: Connection, version: int, target: int, migrations: Mapping[int, Sequence[str]]
) -> None:
    """Lead a database from one version of the tables to another, in the caller's transaction.

    Raises:
        StateError: it is newer than `target`, or `migrations` has no way to it.
    """
    if version > target:
        raise StateError(
            f"the database is of version {version}, this fedpeft reads version {target}; run the fedpeft that"
            " wrote it, or give another --state"
        )
    missing = [step for step in range(version, target) if step not in migrations]
    if missing:
        raise StateError(
            f"the database is of version {version}, version {target} is needed; back it up, then run:"
            " fedpeft server --migrate"
        )
    for step in range(version, target):
        for statement in migrations[step]:
            connection.execute(text(statement))
    if version < target:
        connection.execute(schema_version.update().values(version=target))


def _one_line(name: str, error: SQLAlchemyError) -> StateError | StorageError:
    what = _first_line(error.orig if isinstance(error, DBAPIError) and error.orig else error)
    said = what.lower()
    if any(word in said for word in _LOCKED):
        return StorageError(f"{name}: the database is locked by another process; end it, and runs go on")
    if any(word in said for word in _FULL):
        return StorageError(f"{name}: no disk space is left for the database; free some, and runs go on")
    if "not a database" in said or "malformed" in said:
        return StateError(f"{name} is no database that can be read ({what}); restore it from a backup")
    if isinstance(error, OperationalError):
        return StorageError(f"{name}: the database cannot be used ({what}); check its path and permissions")
    return StateError(f"{name}: the database refused a statement ({what}); it may be damaged")


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
