"""Processes that serve another one, and end with it: after kill -9 nobody else would end them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

POLL_S = 0.5
_PR_SET_PDEATHSIG = 1
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="fedpeft-starter")


def start_child(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that calls `exit_with_parent`, as `subprocess.Popen` does; from any thread.

    Linux takes the thread that started a process for its parent and kills the process when that thread ends,
    so all of them are started by one thread that lasts as long as this process.
    """
    return _STARTER.submit(lambda: subprocess.Popen(words, **options)).result()


def exit_with_parent(parent: int) -> None:
    """From now on, end this process as soon as its parent is not `parent` any more; returns at once.

    On Linux the kernel does so, whatever this process is at. Elsewhere a thread of it looks, which a native
    call holds up for as long as it keeps the interpreter to itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
