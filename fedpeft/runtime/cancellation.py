"""Leaving a training whose result nobody wants any more, between two of its steps.

A worker process holds one order at a time and heeds one signal: it raises a flag, which the loops of local
training ask about at each step. So a model that takes minutes to load stays loaded, and no step is cut in the
middle. In processes that don't heed the signal nothing is ever interrupted.
"""

from __future__ import annotations

import signal
import threading

from fedpeft.errors import FederationError

INTERRUPT = signal.SIGURG  # ignored by processes that don't heed it, such as a worker that is still starting
_FLAG = threading.Event()  # of this process, whose one order it is about


class CancelledTrainingError(FederationError):
    """The training was left: its result is not wanted."""


def install_cancellation() -> None:
    """From now on a signal raises the flag; on the process's main thread."""
    signal.signal(INTERRUPT, lambda *_: _FLAG.set())


def clear_cancellation() -> None:
    """Begin an order: what came before was not about it."""
    _FLAG.clear()


def check_cancelled() -> None:
    """Between two steps.

    Raises:
        CancelledTrainingError: nobody wants the result any more.
    """
    if _FLAG.is_set():
        raise CancelledTrainingError("the task was withdrawn while it was trained; nothing was sent")
