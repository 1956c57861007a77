"""What was done in the authority's folder beside the server, taken into the server's audit log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fedpeft.credentials.actions import ACTIONS_FILE, AuthorityAction, read_actions
from fedpeft.errors import StorageError
from fedpeft_server.store.audit_log import SERVER, Action, Actor, AuditLog

LOG = logging.getLogger("fedpeft.server")
ROLE = "authority"  # of these entries' actors; no certificate has it
_TAKEN = (Action.CREATED, Action.ISSUED, Action.INVITED, Action.RENEWED, Action.REVOKED)
_LONGEST = 256  # characters of a name


class AuthorityActions:
    """Takes in what is new each time it is asked; lines that are missing are themselves recorded.

    Args:
        authority: the folder; None: it is elsewhere, and nothing is done.
    """

    def __init__(self, authority: Path | None, audit: AuditLog) -> None:
        self._authority, self._audit = authority, audit
        self._size = -1
        self._cut = False

    def take_in(self) -> None:
        """Record every line that was not recorded before; what cannot be done now is done later."""
        if self._authority is None:
            return
        path = self._authority / ACTIONS_FILE
        try:
            size = path.stat().st_size if path.exists() else 0
            if size != self._size:
                self._take(read_actions(self._authority))
                self._size = size
        except (OSError, StorageError) as error:
            LOG.warning("what was done in %s is not in the audit log yet: %s", self._authority, error)

    def _take(self, lines: list[AuthorityAction | None]) -> None:
        last = self._audit.last_of(ROLE)
        had = 0 if last is None else int(json.loads(last.detail).get("line", 0))
        if len(lines) < had and not self._cut:
            self._cut = True
            LOG.error("%s/%s has %d lines, %d were there", self._authority, ACTIONS_FILE, len(lines), had)
            self._audit.record(SERVER, Action.CUT, ACTIONS_FILE, expected=had, found=len(lines))
        for number, line in enumerate(lines[had:], start=had + 1):
            if line is None or line.action not in set(_TAKEN):
                LOG.error("%s/%s: line %d cannot be read", self._authority, ACTIONS_FILE, number)
                self._audit.record(Actor("unknown", ROLE), Action.CUT, ACTIONS_FILE, line=number)
                continue
            self._audit.record(
                Actor(line.actor[:_LONGEST], ROLE),
                Action(line.action),
                line.subject[:_LONGEST],
                line=number,
                at_ms=line.at_ms,
                role=line.role[:_LONGEST],
            )
