"""Runs, agents and files as the messages that people get."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from fedpeft import __version__
from fedpeft.config.run_file import run_from_toml
from fedpeft.config.sections import RunConfig
from fedpeft.errors import StateError, UsageError
from fedpeft.ledger.records import Round, parse_row
from fedpeft.ledger.run_place import ADAPTER, CHECKPOINTS, IDENTITY, REPORT, ROWS, RUN_FILE
from fedpeft.runtime.files import storage
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.runs.members import incomplete
from fedpeft_server.store import Store, StoredRun
from fedpeft_server.transport.grpc_options import LONGEST_REQUEST
from fedpeft_server.transport.sessions import AgentStatus, ServerStatus

TALLIED = 50  # of a run's newest rounds, for the members that people are told of
CHUNK = 256 * 1024
PULLED = (IDENTITY, RUN_FILE, ROWS, ADAPTER, CHECKPOINTS, REPORT, "summary.json", "tensorboard")


def run_of(text: str) -> RunConfig:
    """Read a run file that somebody submits.

    Raises:
        UsageError: it is too long.
        RunFileError: it is no TOML, or every problem of it.
    """
    if len(text.encode()) > LONGEST_REQUEST:
        raise UsageError(f"the run file has more than {LONGEST_REQUEST} bytes; it is no run file")
    return run_from_toml(text.encode(), source="run file")


def run_info(store: Store, stored: StoredRun) -> pb.RunInfo:
    """Say how a run stands."""
    last, agents = (None, []) if stored.problem else (_last_round(store, stored), _agents(store, stored))
    info = pb.RunInfo(
        id=stored.id,
        name=stored.name,
        digest=stored.digest,
        status=stored.status,
        detail=stored.reason or stored.problem,
        round=max(0, stored.round, 0 if last is None else last.round),  # rows outlive removed checkpoints
        rounds=0 if stored.problem else stored.run.run.rounds,
        agents=agents,
        submitted_ms=milliseconds(stored.submitted_at),
        updated_ms=milliseconds(stored.changed_at),
        metrics=_metrics(last),
        adapter_digest=stored.adapter_digest,
        submitter=stored.submitter,
        readers=stored.readers,
    )
    if last is not None and last.epsilon is not None:
        info.epsilon = last.epsilon
    if last is not None and last.epsilon_cohort is not None:
        info.epsilon_cohort = last.epsilon_cohort
    return info


def incomplete_members(store: Store, stored: StoredRun) -> list[pb.MemberRounds]:
    """Say which members' answers have not all counted in a run's newest rounds.

    None of a run that asks more than it has places for, where somebody's answer never counts, nor of one that
    this version cannot read.
    """
    if stored.problem or stored.run.federation.over_selection:
        return []
    return [
        pb.MemberRounds(name=member.name, counted=member.counted, asked=member.asked)
        for member in incomplete(store.rounds(stored).rows(TALLIED))
    ]


def _last_round(store: Store, stored: StoredRun) -> Round | None:
    text = store.rounds(stored).last_row()
    try:
        row = None if text is None else parse_row(text)
    except ValidationError:  # of another version
        row = None
    return row if isinstance(row, Round) else None


def _agents(store: Store, stored: StoredRun) -> list[str]:
    try:
        roster = store.runs.roster(stored.id)
    except StateError:  # of another version
        roster = None
    return [] if roster is None else roster.names


def _metrics(last: Round | None) -> dict[str, float]:
    if last is None or last.evaluation is None:
        return {}
    return {name: score.value for name, score in last.evaluation.scores.items()}


def agent_info(status: AgentStatus) -> pb.AgentInfo:
    """Say how an agent stands."""
    return pb.AgentInfo(
        name=status.name,
        connected=status.connected,
        address=status.address,
        last_seen_ms=milliseconds(status.last_seen),
        capabilities=status.capabilities,
        results=status.results,
        refusals=status.refusals,
        last_refusal=status.last_refusal,
        refused=status.refused,
        calls=status.calls,
        bytes_up=status.bytes_up,
        bytes_down=status.bytes_down,
        certificate_ends_ms=milliseconds(status.certificate_ends or 0.0),
    )


def outline_agent(status: AgentStatus) -> pb.AgentInfo:
    """Say of an agent what does not tell whether a round asked it: counters and times move as it answers."""
    return pb.AgentInfo(
        name=status.name,
        connected=status.connected,
        last_seen_ms=0 if status.connected else milliseconds(status.last_seen),
        capabilities=status.capabilities,
        certificate_ends_ms=milliseconds(status.certificate_ends or 0.0),
    )


def outline_server(status: ServerStatus) -> pb.ServerInfo:
    """Say of the transport what does not tell whether a round asked somebody."""
    info = server_info(status)
    info.refused.clear()
    info.refused_nameless.clear()
    return info


def server_info(status: ServerStatus) -> pb.ServerInfo:
    """Say how the transport stands."""
    return pb.ServerInfo(
        version=__version__,
        started_ms=milliseconds(status.started),
        certificate_ends_ms=milliseconds(status.certificate_ends or 0.0),
        connected=status.connected,
        max_agents=status.max_agents,
        refused=status.refused,
        refused_nameless=status.refused_nameless,
    )


def list_pullable_files(folder: Path) -> Iterator[Path]:
    """The files that people get, whole ones only."""
    for name in PULLED:
        place = folder / name
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (path for path in found if path.is_file() and ".partial-" not in path.as_posix())


def result_chunks(name: str, path: Path) -> Iterator[pb.ResultChunk]:
    """Yield a file in chunks, one at least; raises StorageError."""
    with storage(path):
        size, offset = path.stat().st_size, 0
        with path.open("rb") as file:
            while offset < size or offset == 0:
                data = file.read(CHUNK)
                yield pb.ResultChunk(path=name, offset=offset, size=size, data=data, crc32=zlib.crc32(data))
                offset += len(data)
                if not data:
                    return


def milliseconds(seconds: float) -> int:
    """Return whole milliseconds, as messages have them."""
    return round(1000 * seconds)
