"""Clients that differ from the rest of their run: what is refused of them."""

from __future__ import annotations

from collections.abc import Collection

from fedpeft.config import RecordLevelPrivacy, RunConfig
from fedpeft.errors import RunFileError


def group_problems(run: RunConfig) -> list[str]:
    """What no group may be in, whoever its clients are."""
    if run.groups and isinstance(run.privacy, RecordLevelPrivacy):
        return [
            "groups: record-level privacy is accounted for by one [training] of all clients; remove groups,"
            " or use privacy.kind 'client-level'"
        ]
    return []


def refuse_unknown(run: RunConfig, names: Collection[str]) -> None:
    """Compare the names in groups with those of the run's clients.

    Raises:
        RunFileError: some are not among them.
    """
    known = sorted(names)
    shown = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
    problems = [
        f"groups.{place}.clients: there is no client {client!r}; the run's {len(known)} clients are {shown}"
        for place, group in enumerate(run.groups)
        for client in group.clients
        if client not in names
    ]
    if problems:
        raise RunFileError("run file", problems)
