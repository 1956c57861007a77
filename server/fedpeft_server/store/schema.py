"""The tables, and the steps from one version of them to the next.

`VERSION` is written into a new database. A database of an older version is brought up by `MIGRATIONS`, when
the operator asks for it; one of a newer version is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import (
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
)

VERSION = 1
MIGRATIONS: Mapping[int, Sequence[str]] = {}  # from version -> statements that lead to the next one

METADATA = MetaData()

schema_version = Table("schema_version", METADATA, Column("version", Integer, primary_key=True))

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
    Column("id", String(64), primary_key=True),
    Column("place", Integer, nullable=False, unique=True),  # in the order of submission, from 1
    Column("name", String(80), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("run_json", Text, nullable=False),
    Column("status", String(30), nullable=False),
    Column("reason", Text, nullable=False),
    Column("submitter", String(200), nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("changed_at", Float, nullable=False),
    Column("submission", String(200), nullable=False, unique=True),  # the sender's own name for it
    Column("rules", Text, nullable=False),  # JSON: which agents it may ask
    Column("roster", Text),  # JSON; null until the roll was called
    Column("adapter_digest", String(64), nullable=False),  # empty until it is finished
)

rounds = Table(
    "rounds",
    METADATA,
    Column("run", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("status", String(10), nullable=False),  # open, closed
    Column("cohort", Text, nullable=False),  # JSON
    Column("opened_at", Float, nullable=False),
    Column("deadline_at", Float),  # for people; the deadline itself runs on the monotonic clock
    Column("row", Text),  # JSON of the round's record; null while it is open
)

updates = Table(  # accepted results of training tasks
    "updates",
    METADATA,
    Column("run", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("agent", String(200), primary_key=True),
    Column("task", LargeBinary, nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the body
    Column("size", Integer, nullable=False),
    Column("body", LargeBinary),  # null: it is a blob, or it is counted and gone
    Column("signature", LargeBinary, nullable=False),
    Column("accepted_at", Float, nullable=False),
    Column("counted", Boolean, nullable=False),  # its round is closed
)

checkpoints = Table(
    "checkpoints",
    METADATA,
    Column("run", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("size", Integer, nullable=False),
)

budget = Table(
    "budget",
    METADATA,
    Column("run", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("ledger", Text, nullable=False),  # JSON of all charges, committed before a round asks anyone
)

lines = Table(
    "lines",
    METADATA,
    Column("run", String(64), ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),  # from 1
    Column("at", Float, nullable=False),
    Column("text", Text, nullable=False),
)

refusals = Table(
    "refusals",
    METADATA,
    Column("run", String(64), primary_key=True),
    Column("reason", String(40), primary_key=True),
    Column("count", Integer, nullable=False),
)

Index("updates_by_digest", updates.c.digest)
