"""The tables, and the steps from one version of them to the next.

`VERSION` is written into a new database. A database of an older version is brought up by `MIGRATIONS`, when
the operator asks for it; one of a newer version is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

VERSION = 3
RUN_ID = 100  # characters: a run's name has 80, and its number comes after it


@dataclass(frozen=True)
class Only:
    """A statement that one kind of database needs and the others don't."""

    dialect: str
    sql: str


# From version -> statements that lead to the next one, in one transaction with the new version's number.
MIGRATIONS: Mapping[int, Sequence[str | Only]] = {
    1: (
        "ALTER TABLE rounds ADD COLUMN closed_at FLOAT",
        # SQLite's integers have 64 bits whatever they are called; an update may have more than 2 GiB.
        Only("postgresql", "ALTER TABLE updates ALTER COLUMN size TYPE BIGINT"),
        Only("postgresql", "ALTER TABLE checkpoints ALTER COLUMN size TYPE BIGINT"),
        Only("postgresql", f"ALTER TABLE runs ALTER COLUMN id TYPE VARCHAR({RUN_ID})"),
        *(
            Only("postgresql", f"ALTER TABLE {name} ALTER COLUMN run TYPE VARCHAR({RUN_ID})")
            for name in ("rounds", "updates", "checkpoints", "budget", "lines", "refusals")
        ),
        # Which contents are still needed is asked at each commit, and must not read all that ever came.
        "CREATE INDEX updates_waiting ON updates (digest) WHERE body IS NULL AND NOT counted",
    ),
    2: (
        "ALTER TABLE runs ADD COLUMN kept_bytes BIGINT NOT NULL DEFAULT 0",
        "CREATE INDEX runs_by_status ON runs (status, place)",
        "CREATE INDEX runs_by_submitter ON runs (submitter, place)",
        "CREATE INDEX runs_by_submitter_and_status ON runs (submitter, status)",
        f"CREATE TABLE run_readers (run VARCHAR({RUN_ID}) NOT NULL REFERENCES runs (id),"
        " reader VARCHAR(200) NOT NULL, PRIMARY KEY (run, reader))",
        "CREATE INDEX run_readers_by_reader ON run_readers (reader, run)",
        "CREATE TABLE submitters (name VARCHAR(200) NOT NULL PRIMARY KEY, kept_bytes BIGINT NOT NULL)",
        "UPDATE runs SET kept_bytes = (SELECT coalesce(sum(size), 0) FROM checkpoints WHERE run = runs.id)",
        "INSERT INTO submitters SELECT submitter, sum(kept_bytes) FROM runs GROUP BY submitter",
        "CREATE TABLE audit (number INTEGER NOT NULL PRIMARY KEY, at_ms BIGINT NOT NULL,"
        " actor VARCHAR(200) NOT NULL, role VARCHAR(20) NOT NULL, action VARCHAR(20) NOT NULL,"
        " subject VARCHAR(200) NOT NULL, detail TEXT NOT NULL, digest VARCHAR(64) NOT NULL)",
        "ALTER TABLE schema_version ADD COLUMN epoch BIGINT NOT NULL DEFAULT 0",
    ),
}

METADATA = MetaData()

schema_version = Table(
    "schema_version",
    METADATA,
    Column("version", Integer, primary_key=True),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),  # counts the servers that held it
)

agents = Table(  # for people; certificates, tokens and revocations are files of the authority
    "agents",
    METADATA,
    Column("name", String(200), primary_key=True),
    Column("first_seen", Float, nullable=False),  # times are seconds since 1970, UTC
    Column("last_seen", Float, nullable=False),
)

runs = Table(
    "runs",
    METADATA,
    Column("id", String(RUN_ID), primary_key=True),
    Column("place", Integer, nullable=False, unique=True),  # in the order of submission, from 1
    Column("name", String(80), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("run_json", Text, nullable=False),
    Column("status", String(30), nullable=False),
    Column("reason", Text, nullable=False),
    Column("submitter", String(200), nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("changed_at", Float, nullable=False),
    Column(
        "submission", String(200), nullable=False, unique=True
    ),  # SHA-256 of the sender and its name for it
    Column("rules", Text, nullable=False),  # JSON: which agents it may ask
    Column("roster", Text),  # JSON; null until the roll was called
    Column("adapter_digest", String(64), nullable=False),  # empty until it is finished
    Column("kept_bytes", BigInteger, nullable=False, server_default="0"),  # on the disk; see `usage`
)

run_readers = Table(  # who may read a run besides its submitter and admins
    "run_readers",
    METADATA,
    Column("run", String(RUN_ID), ForeignKey("runs.id"), primary_key=True),
    Column("reader", String(200), primary_key=True),  # a submitter's name, or "*" for all of them
)

submitters = Table(
    "submitters",
    METADATA,
    Column("name", String(200), primary_key=True),
    Column("kept_bytes", BigInteger, nullable=False),  # the sum over its runs
)

audit = Table(  # rows are only ever added; see `audit.py`
    "audit",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=False),  # from 1
    Column("at_ms", BigInteger, nullable=False),  # since 1970, UTC
    Column("actor", String(200), nullable=False),  # by certificate
    Column("role", String(20), nullable=False),
    Column("action", String(20), nullable=False),
    Column("subject", String(200), nullable=False),  # a run's id, or a member's name
    Column("detail", Text, nullable=False),  # JSON
    Column("digest", String(64), nullable=False),  # SHA-256 of this row and of the digest before it
)

rounds = Table(
    "rounds",
    METADATA,
    Column("run", String(RUN_ID), ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("status", String(10), nullable=False),  # open, closed
    Column("cohort", Text, nullable=False),  # JSON
    Column("opened_at", Float, nullable=False),
    Column("deadline_at", Float),  # for people; the deadline itself runs on the monotonic clock
    Column("closed_at", Float),  # null while it is open, and of rounds that version 1 closed
    Column("row", Text),  # JSON of the round's record; null while it is open
)

updates = Table(  # accepted results of training tasks
    "updates",
    METADATA,
    Column("run", String(RUN_ID), ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("agent", String(200), primary_key=True),
    Column("task", LargeBinary, nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the body
    Column("size", BigInteger, nullable=False),
    Column("body", LargeBinary),  # null: it is a blob, or it is counted and gone
    Column("signature", LargeBinary, nullable=False),
    Column("accepted_at", Float, nullable=False),
    Column("counted", Boolean, nullable=False),  # its round is closed
)

checkpoints = Table(
    "checkpoints",
    METADATA,
    Column("run", String(RUN_ID), ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
)

budget = Table(
    "budget",
    METADATA,
    Column("run", String(RUN_ID), ForeignKey("runs.id"), primary_key=True),
    Column("ledger", Text, nullable=False),  # JSON of all charges, committed before a round asks anyone
)

lines = Table(
    "lines",
    METADATA,
    Column("run", String(RUN_ID), ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),  # from 1
    Column("at", Float, nullable=False),
    Column("text", Text, nullable=False),
)

refusals = Table(
    "refusals",
    METADATA,
    Column("run", String(RUN_ID), primary_key=True),
    Column("reason", String(40), primary_key=True),
    Column("count", Integer, nullable=False),
)

Index("runs_by_status", runs.c.status, runs.c.place)
Index("runs_by_submitter", runs.c.submitter, runs.c.place)
Index("runs_by_submitter_and_status", runs.c.submitter, runs.c.status)
Index("run_readers_by_reader", run_readers.c.reader, run_readers.c.run)
Index("updates_by_digest", updates.c.digest)
_WAITING = text("body IS NULL AND NOT counted")
Index("updates_waiting", updates.c.digest, sqlite_where=_WAITING, postgresql_where=_WAITING)
