"""Reads of what is somebody else's, and refusals, in the audit log: each once an hour.

A look that is repeated, and a caller that tries the same again and again, make one entry in that time; what
is refused is counted each time elsewhere (`refusals`). What cannot be written down now does not keep people
from reading: it is said in the server's own log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from fedpeft.credentials import Identity
from fedpeft.errors import StorageError
from fedpeft_server.store.audit_log import Action, Actor, AuditLog

LOG = logging.getLogger("fedpeft.server")
AGAIN_S = 3600.0
_REMEMBERED = 8192  # entries


class AccessLog:
    """See the module; from any thread."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        # Beside the caller, who could tell by the time that it took whether there is such a run.
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="fedpeft-refused")
        self._lock = threading.Lock()
        self._noted: OrderedDict[tuple[str, str, str, str], float] = OrderedDict()

    def read(self, who: Identity, run_id: str, call: str) -> None:
        """Note that somebody reads a run that is not its own, or a list with such runs in it."""
        self._note(who, Action.READ, run_id, call)

    def refuse(self, who: Identity, subject: str, call: str) -> None:
        """Note that somebody was refused; returns at once."""
        self._beside.submit(self._note, who, Action.REFUSED, subject, call)

    def _note(self, who: Identity, action: Action, subject: str, call: str) -> None:
        key, now = (who.name, action.value, subject, call), time.monotonic()
        with self._lock:
            if now - self._noted.get(key, -AGAIN_S) < AGAIN_S:
                return
            self._noted[key] = now
            self._noted.move_to_end(key)
            while len(self._noted) > _REMEMBERED:
                self._noted.popitem(last=False)
        try:
            self._audit.record(Actor(who.name, who.role), action, subject, call=call)
        except StorageError as error:
            LOG.warning("not in the audit log: %s (%s) %s %s: %s", who.name, who.role, action, subject, error)
