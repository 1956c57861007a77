"""A command and its terminal: signs that it cannot show, Ctrl-C once or twice, output with no room left."""

from __future__ import annotations

import errno
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
BROKEN_PIPE = 141
PATIENCE_S = 5.0  # for a command to end by itself after Ctrl-C
_SHOW_CURSOR = b"\x1b[?25h"  # a progress display hides it


class _Interruptions:
    """Ctrl-C so far, and the run that could be gone on with."""

    def __init__(self) -> None:
        self.count = 0
        self.run: Path | None = None
        self.timer: threading.Timer | None = None


_STATE = _Interruptions()


@contextmanager
def at_work_on(run: Path) -> Iterator[None]:
    """Say which run folder can be gone on with if the command is interrupted inside."""
    _STATE.run = run
    yield  # an interruption leaves it as it is: it is asked for afterwards
    _STATE.run = None


def was_interrupted() -> bool:
    """Return whether Ctrl-C has come: what fails afterwards may be its exception, changed on the way."""
    return _STATE.count > 0


def interruption() -> str:
    """Return what is said after Ctrl-C: that, and how the run at work goes on, if there is one."""
    if _STATE.run is None:
        return "interrupted"
    return f"interrupted; the run goes on with: fedpeft simulate --resume {shlex.quote(str(_STATE.run))}"


@contextmanager
def clean_interrupts() -> Iterator[None]:
    """End by an exception at the first Ctrl-C inside, and at once at the second or after `PATIENCE_S`.

    The exception may come where a library drops it, and putting things away may take long. What a process
    writes is whole at any moment, and workers end with it, so ending at once loses nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    _STATE.count, _STATE.run = 0, None
    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if _STATE.timer is not None:
            _STATE.timer.cancel()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    _STATE.count += 1
    if _STATE.count == 1:
        _STATE.timer = threading.Timer(PATIENCE_S, _end_at_once)
        _STATE.timer.daemon = True
        _STATE.timer.start()
        raise KeyboardInterrupt
    _end_at_once()


def _end_at_once() -> None:
    line = f"{interruption()}\n".encode(errors="replace")
    os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + line)
    os._exit(INTERRUPTED)


def end_at_once_when_interrupted() -> None:
    """For what follows the last line: Ctrl-C has nothing left to interrupt, and ends without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def replace_unshown_signs() -> None:
    """Show a question mark for what the encoding of a stream lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_output() -> None:
    """Write out what is still held back, so that failing to is found while it can be said.

    Raises:
        OSError: it cannot be written.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def output_problem(error: OSError) -> tuple[str, int | None]:
    """Return a line about a file or a stream that failed, and the exit code of a reader that went away.

    The line is empty then: whoever closed a pipe has seen enough.
    """
    if error.errno == errno.EPIPE:
        return "", BROKEN_PIPE
    what = "the output" if error.filename is None else str(error.filename)
    reason = error.strerror or str(error)
    return f"{what} cannot be read or written ({reason}); free disk space, or check the path", None


def drop_output() -> None:
    """Send what is still held back to nowhere: it cannot be written, and has been said so."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
