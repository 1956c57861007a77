"""`fedpeft server audit`: the audit log of a state that is here, whether its server runs or not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fedpeft.errors import StateError
from fedpeft.reporting.text import printable
from fedpeft_server.ops.server_settings import with_given
from fedpeft_server.store.audit_log import HEAD, AuditEntry, Head, find_faults, read_entries, read_head
from fedpeft_server.store.database import Database
from fedpeft_server.store.store import DATABASE


def audit_command(
    config: Path | None, given: Mapping[str, Any], known: Sequence[str], *, entries: bool, as_json: bool
) -> None:
    """Print the log of a server's state, and check it.

    Args:
        known: numbers and digests that were noted before, as text.
        entries: print them too, and not the result of the check alone.

    Raises:
        UsageError: what is known names no entry.
        StateError: there is no log here, or an entry is missing or changed.
        StorageError: it cannot be read.
    """
    settings = with_given(config, given)
    noted = [("--known", Head.parse(text)) for text in known]
    own = settings.state / DATABASE
    if not settings.database and not own.is_file():
        raise StateError(f"{own} is not there; give --state and --database as the server has them")
    kept = read_head(settings.state / HEAD)
    # Read before the table, as the server writes it after the table.
    places = noted if kept is None else [(str(settings.state / HEAD), kept), *noted]
    with closing(Database(settings.database or f"sqlite:///{own.resolve()}")) as database:
        found = read_entries(database)
        faults, last = find_faults(_print_entries(found, as_json=as_json) if entries else found, places)
    for fault in faults:
        print(json.dumps({"fault": fault}) if as_json else f"fault    {fault}")
    if faults:
        raise StateError(
            f"the audit log is not as it was written: {len(faults)} faults; keep a copy of"
            f" {settings.state}, and compare it with a backup"
        )
    if as_json:
        print(json.dumps({"last": str(last)}))
    else:
        print(f"last     {last}\n         every entry follows the one before; note this line elsewhere")


def _print_entries(entries: Iterator[AuditEntry], *, as_json: bool) -> Iterator[AuditEntry]:
    for entry in entries:
        if as_json:
            print(json.dumps({**vars(entry), "detail": _detail(entry)}))
        else:
            print(_line(entry))
        yield entry


def _line(entry: AuditEntry) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.at_ms / 1000))
    detail = " ".join(f"{name}={value}" for name, value in sorted(_detail(entry).items()))
    who = f"{entry.actor} ({entry.role})"
    line = f"{entry.number:>7}  {at}  {who}  {entry.action}  {entry.subject}  {detail}"
    return printable(line.rstrip())  # a reason is its sender's, and a changed entry may hold anything


def _detail(entry: AuditEntry) -> Mapping[str, Any]:
    try:
        fields = json.loads(entry.detail)
    except ValueError:
        fields = None
    return (
        fields if isinstance(fields, dict) else {"detail": entry.detail}
    )  # a changed entry's may be anything
