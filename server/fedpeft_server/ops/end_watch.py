"""The end of the daemon in bounded time, whatever its threads are at.

Python calls a signal's handler between two of its own steps, and a native call that keeps the interpreter
to itself lets no step come. So what the system calls at once tells another process, through a pipe; that one
kills the daemon if it has not ended by then, which costs nothing that is committed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROGRAM = """
import os, select, signal, sys
pipe, daemon, limit_s, trace = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
if os.read(pipe, 1):  # nothing: it has ended by itself
    while select.select([pipe], [], [], limit_s)[0]:
        if not os.read(pipe, 64):
            sys.exit()
    why = f"not at its end {limit_s:g} s after the signal"
    print(f"fedpeft server: {why}; it is killed, and its runs go on from their last commits", file=sys.stderr,
          flush=True)
    if os.getppid() == daemon:
        if trace:
            with open(trace, "a") as file:
                print(why, file=file)
        os.kill(daemon, signal.SIGKILL)
"""


@contextmanager
def end_within(limit_s: float, trace: Path | None = None) -> Iterator[None]:
    """From now on a signal that Python handles ends this process within `limit_s`; on the main thread.

    That holds for what comes after the block, too, until the process has ended; an error that leaves the
    block ends it.

    Args:
        trace: a file that says for the next start that this end had to be forced.
    """
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    arguments = (theirs, os.getpid(), limit_s, trace or "")
    words = [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, arguments)]
    watcher = subprocess.Popen(
        words,
        pass_fds=(theirs,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={},
        start_new_session=True,
    )
    os.close(theirs)
    before = signal.set_wakeup_fd(ours, warn_on_full_buffer=False)
    try:
        yield
    except BaseException:
        signal.set_wakeup_fd(before)
        os.close(ours)
        watcher.wait()
        raise
    _LASTING.append(watcher)


_LASTING: list[subprocess.Popen[bytes]] = []  # nobody waits for them: they end after this process
