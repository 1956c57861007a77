"""Points at which a test can kill a process, so that "kill -9 at any moment is safe" is tried at each.

``crash_point("server.checkpoint.written")`` does nothing in production. With ``FEDPEFT_CRASH_AT`` set to that
name the process kills itself there with SIGKILL, as a power cut would: no handler runs, nothing is flushed.
``FEDPEFT_CRASH_AT=NAME:3`` lets two passes go by and dies at the third. With ``FEDPEFT_CRASH_ONCE=FILE`` only
the process that makes that file dies, and none of those that are started in its place.

Names are dotted, begin with ``server.`` or ``agent.``, and are literals that occur once in the sources, since
the tests find them by reading these. Put one before and one after each step that makes something durable or
tells someone else: a file's write, its flush, its rename, a transaction, a message, an acknowledgement.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE, ONCE = "FEDPEFT_CRASH_AT", "FEDPEFT_CRASH_ONCE"


class _Trap:
    """The point to die at and how many passes are left; of the empty name, none."""

    def __init__(self, text: str) -> None:
        self.name, _, passes = text.partition(":")
        self._left = int(passes) if passes.isdigit() else 1
        self._lock = threading.Lock()

    def spring(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0 and _first(os.environ.get(ONCE, "")):
                os.kill(os.getpid(), signal.SIGKILL)


def _first(marker: str) -> bool:
    """Whether nobody died before us."""
    if not marker:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


_TRAP = _Trap(os.environ.get(VARIABLE, ""))  # set once, when the process starts


def arm(text: str) -> None:
    """As if this process had been started with the variable set to `text`: for one that was forked."""
    global _TRAP
    _TRAP = _Trap(text)


def crash_point(name: str) -> None:
    """Die here if the environment says so; otherwise nothing."""
    if _TRAP.name == name:
        _TRAP.spring()
