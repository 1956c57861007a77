"""Processes that hold models for the daemon, which itself loads none and imports nothing that could.

They are started afresh, not forked: gRPC's threads do not survive a fork. Each ends by itself when nothing is
asked of it for a while, and with the daemon.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from io import BufferedReader
from typing import Any

from fedpeft import errors
from fedpeft.config import RunConfig
from fedpeft.errors import FedPEFTError, RunFileError
from fedpeft.frames import Frame, pack, read_frame
from fedpeft.runfile import run_json
from fedpeft_server.control import Paused


class ModelProcess:
    """One process, started when something is asked of it; one thread at a time asks."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._answers: BufferedReader | None = None

    @property
    def pid(self) -> int | None:
        """The process's, while it runs."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process is not None else None

    def ask(self, what: str, given: Mapping[str, Any], parts: Mapping[str, bytes] | None = None) -> Frame:
        """Have something done; everything that it needs goes along, since the process may be a new one.

        Raises:
            FedPEFTError: as the order did there.
            Paused: the process was killed, which is worth another attempt.
        """
        content = pack(Frame({"do": what, **given}, parts or {}))
        answer = self._exchanged(content)
        if answer is None and self._process is not None and self._process.wait() == 0:
            self.close()  # it had just ended for want of work
            answer = self._exchanged(content)
        if answer is None:
            died = self._epitaph()
            self.close()
            raise Paused(f"the process that holds the model died ({died}); it is started anew")
        if answer.header.get("error"):
            raise _error(answer.header)
        return answer

    def close(self) -> None:
        """End it now, and with it what it holds."""
        for part in (self._answers, self._socket):
            if part is not None:
                part.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = self._answers = None

    def _exchanged(self, content: bytes) -> Frame | None:
        """The answer; None if the process is gone."""
        try:
            sender, answers = self._running()
            sender.sendall(content)
            return read_frame(answers)
        except OSError:
            return None

    def _running(self) -> tuple[socket.socket, BufferedReader]:
        if self._socket is not None and self._answers is not None:
            return self._socket, self._answers
        ours, theirs = socket.socketpair()
        words = [
            sys.executable,
            "-m",
            "fedpeft_server.model_process",
            str(theirs.fileno()),
            str(self._keep_s),
        ]
        with theirs:
            self._process = subprocess.Popen(
                words,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # a terminal's Ctrl-C is the daemon's to handle
            )
        self._socket, self._answers = ours, ours.makefile("rb")
        return self._socket, self._answers

    def _epitaph(self) -> str:
        code = self._process.wait() if self._process is not None else 0
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name


class ModelRoom:
    """The daemon's processes for models; from any thread.

    Args:
        keep_s: how long a process without work stays, so that the next one need not load again.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._idle: ModelProcess | None = None
        self._taken: set[ModelProcess] = set()

    def take(self) -> ModelProcess:
        """A process for one user: the idle one, with its imports done, or another."""
        with self._lock:
            process, self._idle = self._idle or ModelProcess(self._keep_s), None
            self._taken.add(process)
        return process

    def give_back(self, process: ModelProcess) -> None:
        """For the next user, who takes it if it comes in time."""
        with self._lock:
            self._taken.discard(process)
            surplus, self._idle = self._idle, process
        if surplus is not None:
            surplus.close()

    def end(self, process: ModelProcess) -> None:
        """It is not needed again, and its memory is."""
        with self._lock:
            self._taken.discard(process)
        process.close()

    def check(self, run: RunConfig) -> None:
        """Refuse a run whose file has problems, as `fedpeft.preflight.refuse_problems` does.

        Raises:
            RunFileError: all of them.
            StorageError: they cannot be looked for now.
        """
        process = self.take()
        try:
            process.ask("check", {"run": run_json(run)})
        except Paused as error:
            raise errors.StorageError(f"{error}; submit the run again") from error
        finally:
            self.give_back(process)

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            processes = [*self._taken, *filter(None, (self._idle,))]
            self._idle = None
        for process in processes:
            process.close()


def _error(header: Mapping[str, Any]) -> Exception:
    """The error that an order ended with."""
    name, text = str(header["error"]), str(header["text"])
    if name == "RunFileError":
        return RunFileError(str(header["source"]), list(header["problems"]))
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FedPEFTError):
        return kind(text)
    return RuntimeError(f"{name}: {text}")


def _environment() -> dict[str, str]:
    """The daemon's own, with one thread: results are those of one thread."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
