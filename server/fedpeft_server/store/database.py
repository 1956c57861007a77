"""Opening the database: any SQLAlchemy URL, a version that fits, and errors as one line of ours."""

from __future__ import annotations

import functools
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft_server.store.schema import METADATA, MIGRATIONS, VERSION, Only, schema_version

BUSY_S = 5.0
CONNECT_S = 10  # for a database to accept a connection, or what was sent over one
_AT_A_TIME = 500  # rows that are copied
SQLITE, POSTGRESQL = "sqlite", "postgresql"
_WRITER, _OWNER = 0x66656470_01, 0x66656470_02  # our advisory locks: "fedp" and a number
_LOCKED = ("locked", "busy", "lock timeout")
_FULL = ("disk is full", "no space left", "disk i/o error", "could not extend file")


class TakenOverError(StorageError):
    """Another server owns the database: this one writes nothing any more, and has to end."""


class Database:
    """Transactions on one database; safe to use from several threads.

    Args:
        create: make the tables where there are none.
        epoch: of the server for which this process writes; None: for none, or one that is to `own` it.
        observe: told how many seconds each transaction that writes took, the wait for its lock included.

    Raises:
        UsageError: the URL names no database that is installed.
        StateError: it is of another version, or no database at all.
        StorageError: it cannot be reached or written.
    """

    def __init__(
        self,
        url: str,
        *,
        create: bool = False,
        migrate: bool = False,
        epoch: int | None = None,
        busy_s: float = BUSY_S,
        observe: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._observe = observe
        self._owner: Connection | None = None
        self._epoch: int | None = None
        self._lost = ""
        self._name, self._engine = _engine(url, busy_s)
        self._writer = self._engine.execution_options(begin="IMMEDIATE")
        try:
            with self._name_errors():
                _prepare(self, self._name, create=create, migrate=migrate)
        except BaseException:
            self._engine.dispose()
            raise
        self._epoch = epoch

    @property
    def epoch(self) -> int | None:
        """The number of the server that this process writes for; None: it writes for none."""
        return self._epoch

    @property
    def reason_of_loss(self) -> str:
        """Why this process may not write any more, in one line; empty while it may."""
        return self._lost

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._name_errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A transaction that only reads, and sees nothing of what is committed while it lasts."""
        with self._name_errors(), self._engine.connect() as connection:
            if self._engine.dialect.name != SQLITE:  # whose readers see one moment anyway
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is durable when the block ends, or did not happen.

        Raises:
            TakenOverError: another server owns the database now; nothing is written.
        """
        began = time.perf_counter()
        with self._name_errors(), self._writer.begin() as connection:
            self._check_epoch(connection)
            yield connection
        self._observe(time.perf_counter() - began)

    def own(self) -> None:
        """Be the only server on this database until it is closed; for SQLite the state folder sees to that.

        The lock goes with a session of the database, and so with its restart. What holds then is the epoch:
        whoever owns the database counts it up, and each transaction that writes finds its own one or fails.
        Writers come one after the other, so nobody counts it up in between.

        Raises:
            StateError: another server holds it.
        """
        if not self._take_lock():
            self.close()
            raise StateError(
                f"{self._name} is in use by another fedpeft server; end it, or give another --database"
            )
        with self.writing() as connection:
            connection.execute(schema_version.update().values(epoch=schema_version.c.epoch + 1))
            epoch = int(connection.execute(select(schema_version.c.epoch)).scalar_one())
        self._epoch = epoch

    def watch(self) -> None:
        """Look whether the database is still this server's, and lock it again where a restart let it go.

        Raises:
            TakenOverError: it is another server's, or was meanwhile.
            StorageError: it cannot be reached now.
        """
        if not self._holds_lock() and not self._take_lock():
            self._lose()
        with self.reading() as connection:
            self._check_epoch(connection)

    def close(self) -> None:
        """Close all connections."""
        self._let_lock_go()
        self._engine.dispose()

    def _holds_lock(self) -> bool:
        if self._engine.dialect.name != POSTGRESQL:
            return True
        if self._owner is None:
            return False
        try:
            self._owner.exec_driver_sql("SELECT 1")
            self._owner.commit()
        except SQLAlchemyError:  # the session has ended, and the lock with it
            self._let_lock_go()
            return False
        return True

    def _take_lock(self) -> bool:
        if self._engine.dialect.name != POSTGRESQL:
            return True
        with self._name_errors():
            self._owner = self._engine.connect()
            taken = self._owner.exec_driver_sql(f"SELECT pg_try_advisory_lock({_OWNER})").scalar_one()
            self._owner.commit()  # the lock is the session's, not the transaction's
        if not taken:
            self._let_lock_go()
        return bool(taken)

    def _let_lock_go(self) -> None:
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.invalidate()  # closes it rather than putting it aside with the lock
            owner.close()

    def _check_epoch(self, connection: Connection) -> None:
        if self._epoch is not None:
            held = connection.execute(select(schema_version.c.epoch)).scalar_one()
            if held != self._epoch:
                self._lose()

    def _lose(self) -> NoReturn:
        self._lost = (
            f"{self._name} was taken over by another fedpeft server while the database was away; this one has"
            " stopped writing. Let one of them go on, and give the other another --database"
        )
        raise TakenOverError(self._lost)

    @contextmanager
    def _name_errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise _one_line(self._name, error) from error


def _engine(url: str, busy_s: float) -> tuple[str, Engine]:
    """The engine, and the database's name without its password."""
    try:
        dialect = make_url(url).get_dialect().name
        waits = _postgresql_waits(busy_s) if dialect == POSTGRESQL else {}
        engine = create_engine(url, pool_pre_ping=dialect != SQLITE, connect_args=waits)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise UsageError(
            f"the database URL cannot be used ({_first_line(error)}); give one like"
            " sqlite:////var/lib/fedpeft/state.db, or install the driver that it names"
        ) from error
    if dialect == SQLITE:
        event.listen(engine, "connect", functools.partial(_set_up_sqlite, busy_s))
        event.listen(engine, "begin", _begin_sqlite)
    elif dialect == POSTGRESQL:
        event.listen(engine, "begin", _begin_postgresql)
    return engine.url.render_as_string(hide_password=True), engine


def _postgresql_waits(busy_s: float) -> dict[str, str | int]:
    """How long a database that does not answer is waited for, by libpq's names: no call waits for ever."""
    return {
        "options": f"-c lock_timeout={int(busy_s * 1000)}",
        "connect_timeout": CONNECT_S,
        "tcp_user_timeout": 1000 * CONNECT_S,
    }


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


def _begin_postgresql(connection: Connection) -> None:
    """One writer at a time, as with SQLite: what a transaction that writes has read holds until its end."""
    if connection.get_execution_options().get("begin"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER})")


def _prepare(database: Database, where: str, *, create: bool, migrate: bool) -> None:
    """Make the tables, or bring them up to date, or refuse."""
    with database.writing() as connection:
        names = set(inspect(connection).get_table_names())
        if not names and not create:
            raise StateError(
                f"{where} holds no tables of a server; give --state and --database as the server has them, or"
                " restore a backup"
            )
        if not names:
            METADATA.create_all(connection)
            connection.execute(schema_version.insert().values(version=VERSION))
            return
        if schema_version.name not in names:
            raise StateError("the database holds tables of another program; give fedpeft one of its own")
        version = connection.execute(select(schema_version.c.version)).scalar_one()
        bring_up(connection, int(version), VERSION, MIGRATIONS if migrate else {})


def bring_up(
    connection: Connection, version: int, target: int, migrations: Mapping[int, Sequence[str | Only]]
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
            if isinstance(statement, str):
                connection.execute(text(statement))
            elif statement.dialect == connection.dialect.name:
                connection.execute(text(statement.sql))
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


def copy_tables(source: str, target: str) -> None:
    """Copy all rows of one database, as they are at one moment, into another one that is empty.

    Raises:
        UsageError: a URL names no database that is installed.
        StateError: one of them is of another version, or the target has rows.
        StorageError: one of them cannot be read or written.
    """
    old, new = Database(source), None
    try:
        new = Database(target, create=True)
        with old.snapshot() as reading, new.writing() as writing:
            for table in METADATA.sorted_tables:
                if table is schema_version:
                    continue
                if writing.execute(select(table).limit(1)).first() is not None:
                    raise StateError(f"the target has rows in {table.name} already; give an empty database")
                rows = reading.execution_options(yield_per=_AT_A_TIME).execute(select(table))
                for some in rows.mappings().partitions():
                    writing.execute(table.insert(), [dict(row) for row in some])
    finally:
        old.close()
        if new is not None:
            new.close()
