"""What is done in the authority's folder, noted beside it: a line each, before it is done.

`fedpeft provision` works where the authority's key is, with or without a server. A server that has the
folder takes new lines into its audit log, where they can no longer be changed unseen.
"""

from __future__ import annotations

import getpass
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from fedpeft.runtime.files import append_line, storage

ACTIONS_FILE = "actions.jsonl"


@dataclass(frozen=True)
class AuthorityAction:
    """One line.

    Attributes:
        at_ms: milliseconds since 1970, UTC.
        actor: the user of the machine.
        action: created, issued, invited, renewed or revoked.
        subject: the member's name.
        role: the member's.
    """

    at_ms: int
    actor: str
    action: str
    subject: str
    role: str = ""


def note_action(authority: Path, action: str, subject: str, now: datetime, role: str = "") -> None:
    """Note what is about to be done, durably.

    Args:
        authority: the folder of the authority; it must be there.

    Raises:
        StorageError: it cannot be written; then nothing may be done.
    """
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        user = "unknown"
    made = AuthorityAction(round(1000 * now.timestamp()), user, action, subject, role)
    path = authority / ACTIONS_FILE
    fresh = not path.exists()
    append_line(path, json.dumps(asdict(made), sort_keys=True))
    if fresh:
        with storage(path):
            path.chmod(0o600)


def read_actions(authority: Path) -> list[AuthorityAction | None]:
    """Return all lines in order; None for one that cannot be read.

    Raises:
        StorageError: the file cannot be read.
    """
    path = authority / ACTIONS_FILE
    with storage(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [_parse(line) for line in lines]


def _parse(line: str) -> AuthorityAction | None:
    try:
        found = AuthorityAction(**json.loads(line))
    except (ValueError, TypeError):
        return None
    texts = (found.actor, found.action, found.subject, found.role)
    return found if all(isinstance(text, str) for text in texts) and isinstance(found.at_ms, int) else None
