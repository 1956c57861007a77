"""How the runs of a daemon stand: written where that is possible, remembered while it is not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from fedpeft.errors import StorageError
from fedpeft.runtime.repeats import Repeats
from fedpeft_server.store import RunStatus, Store, StoredRun

LOG = logging.getLogger("fedpeft.server")
RETRY_S = 0.5  # between attempts to write what must be written
_STORAGE = "storage"  # the kind of all warnings of a store that cannot be used


class RunStatuses:
    """Writes how runs stand, and says so in the daemon's log; from any thread.

    Args:
        ending: whether the server ends, so that nothing is waited for any more.
        repeats: what is said once a minute while it lasts.
    """

    def __init__(self, store: Store, ending: Callable[[], bool], repeats: Repeats | None = None) -> None:
        self._store, self._ending = store, ending
        self._repeats = repeats or Repeats()
        self._unwritten: dict[str, str] = {}  # why a run pauses, while that cannot be written

    def as_it_stands(self, stored: StoredRun) -> StoredRun:
        """The run with what could not be written of it."""
        reason = self._unwritten.get(stored.id)
        return stored if reason is None else replace(stored, status=RunStatus.PAUSED, reason=reason)

    def pause(self, run_id: str, why: Exception) -> None:
        """Something is in the run's way, and it is tried again."""
        self._warn(
            _STORAGE if isinstance(why, StorageError) else run_id, f"run {run_id}: paused: {why}", run_id
        )
        self._note(run_id, RunStatus.PAUSED, one_line(why))

    def trouble(self, run_ids: Iterable[str], line: str | None) -> None:
        """What keeps the updates of these runs from being stored, in one line; None: nothing any more."""
        if line is not None:
            self._warn(_STORAGE, f"updates cannot be stored, and runs wait: {line}")
        elif self._repeats.over(_STORAGE):
            LOG.info("updates can be stored again")
        for run_id in run_ids:
            if line is not None:
                self._note(run_id, RunStatus.PAUSED, line)
            elif self._is_paused(run_id):
                self._note(run_id, RunStatus.RUNNING, "")

    def settle(self, run_id: str, status: RunStatus, reason: str) -> None:
        """Write a final status for as long as it takes; if the server ends before, the run is tried again."""
        facts = {"event": "status", "run": run_id, "status": str(status)}
        LOG.info("run %s: %s %s", run_id, status, reason, extra=facts)
        self.patiently(lambda: self._store.runs.set_status(run_id, status, reason))

    def clear(self, run_id: str) -> None:
        """The run is not held any more."""
        self._unwritten.pop(run_id, None)
        self._repeats.over(run_id)

    def patiently(self, work: Callable[[], None]) -> None:
        """Do it, again and again while the store cannot be used."""
        while True:
            try:
                work()
            except StorageError as error:
                self._warn(_STORAGE, str(error))
                if self._ending():
                    return
                time.sleep(RETRY_S)
            else:
                return

    def _note(self, run_id: str, status: RunStatus, reason: str) -> None:
        """Write a passing status if that is possible; it says why it may not be."""
        try:
            self._store.runs.set_status(run_id, status, reason)
        except StorageError:
            self._unwritten[run_id] = reason
        else:
            self._unwritten.pop(run_id, None)

    def _is_paused(self, run_id: str) -> bool:
        try:
            return self.as_it_stands(self._store.runs.get(run_id)).status == RunStatus.PAUSED
        except StorageError:
            return False

    def _warn(self, kind: str, line: str, run_id: str = "") -> None:
        if self._repeats.due(kind):
            facts = {"event": "status", "run": run_id, "status": str(RunStatus.PAUSED)} if run_id else {}
            LOG.warning("%s", " ".join(line.split()), extra=facts)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())
