"""Processes that hold models for the daemon, which itself loads none and imports nothing that could.

They are started afresh, not forked: gRPC's threads do not survive a fork. Each ends by itself when nothing is
asked of it for a while, and with the daemon. What is asked has a time limit: a process that is at it longer,
whatever a run file made it do, is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from io import BufferedReader
from typing import Any

from fedpeft.config.run_file import run_json
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError, StorageError
from fedpeft.runtime.child_environment import child_environment
from fedpeft.runtime.frames import Frame, pack, read_frame
from fedpeft.runtime.parent_exit import start_child
from fedpeft.wire.failures import from_record
from fedpeft_server.runs.control import ProcessLostError

CHECKS = 2  # run files that are looked at at a time, each by a process that has loaded torch


class TookTooLongError(ProcessLostError):
    """The process was at one order for longer than it may be, and was killed."""


class ModelProcess:
    """One process, started when something is asked of it; one thread at a time asks, any thread kills.

    Args:
        keep_s: how long it stays without work.
        task_s: how long it may be at what is asked.
        variables: of the environment, that it gets beside those that `child_environment` names.
    """

    def __init__(self, keep_s: float, task_s: float, variables: Collection[str] = ()) -> None:
        self._keep_s, self._task_s, self._variables = keep_s, task_s, variables
        self._unwanted = False  # also while it is being started
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._answers: BufferedReader | None = None

    @property
    def pid(self) -> int | None:
        """The process's, while it runs."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process is not None else None

    def ask(
        self,
        what: str,
        given: Mapping[str, Any],
        parts: Mapping[str, bytes] | None = None,
        *,
        limit_s: float | None = None,
    ) -> Frame:
        """Have something done; everything that it needs goes along, since the process may be a new one.

        Args:
            limit_s: how long it may take; None, or more than the process's own: as that says.

        Raises:
            FedPEFTError: as the order did there.
            TookTooLongError: it was not done in time, and the process was killed.
            ProcessLostError: the process died, or was killed by somebody else.
        """
        self._unwanted = False
        content = pack(Frame({"do": what, **given}, parts or {}))
        limit_s = min(limit_s or self._task_s, self._task_s)
        answer = self._exchange(content, limit_s)
        if answer is None and self._process is not None and self._process.wait() == 0:
            self.close()  # it had just ended for want of work
            answer = self._exchange(content, limit_s)
        if answer is None:
            died = self._epitaph()
            self.close()
            raise ProcessLostError(f"the process that holds the model died ({died}); it is started anew")
        if answer.header.get("error"):
            raise from_record(answer.header["error"])
        return answer

    def kill(self) -> None:
        """End it now; a thread that waits for its answer gets a `ProcessLostError`. From any thread."""
        self._unwanted = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End it now, and with it what it holds; nobody waits for its answer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for part in (self._answers, self._socket):
            if part is not None:
                part.close()
        self._process = self._socket = self._answers = None

    def _exchange(self, content: bytes, limit_s: float) -> Frame | None:
        """The answer; None if the process is gone.

        Raises:
            TookTooLongError: there is none by then.
        """
        watch = threading.Timer(limit_s, self.kill)
        watch.daemon = True
        began = time.monotonic()
        try:
            watch.start()
            sender, answers = self._running()
            if self._unwanted:
                self.kill()
            sender.sendall(content)
            answer = read_frame(answers)
        except OSError:
            answer = None
        finally:
            watch.cancel()
        if answer is None and time.monotonic() - began >= limit_s:
            self.close()
            raise TookTooLongError(f"its model's process was at one task for {limit_s:g} s and was ended")
        return answer

    def _running(self) -> tuple[socket.socket, BufferedReader]:
        if self._socket is not None and self._answers is not None:
            return self._socket, self._answers
        ours, theirs = socket.socketpair()
        words = [
            sys.executable,
            "-m",
            "fedpeft_server.runs.model_worker",
            str(theirs.fileno()),
            str(self._keep_s),
            str(os.getpid()),
        ]
        with theirs:
            self._process = start_child(
                words,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=child_environment(self._variables, network=True, database=True),
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


class ModelProcessPool:
    """The daemon's processes for models; from any thread.

    Args:
        keep_s: how long a process without work stays, so that the next one need not load again.
        task_s: how long a process may be at one task of a run: to load, evaluate or export.
        check_s: how long the check of a submitted run file may take, the start of a process included.
        variables: see `ModelProcess`.
    """

    def __init__(
        self,
        keep_s: float,
        *,
        task_s: float = 7200.0,
        check_s: float = 300.0,
        variables: Collection[str] = (),
    ) -> None:
        self._keep_s, self._task_s, self._check_s, self._variables = keep_s, task_s, check_s, variables
        self._checking = threading.BoundedSemaphore(CHECKS)
        self._lock = threading.Lock()
        self._idle: ModelProcess | None = None
        self._taken: set[ModelProcess] = set()

    def take(self) -> ModelProcess:
        """A process for one user: the idle one, with its imports done, or another."""
        with self._lock:
            process, self._idle = self._idle or self._new_process(), None
            self._taken.add(process)
        return process

    def _new_process(self) -> ModelProcess:
        return ModelProcess(self._keep_s, self._task_s, self._variables)

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
        """Refuse a run whose file has problems, as `fedpeft.planning.preflight.refuse_problems` does.

        Raises:
            RunFileError: all of them, or that they could not be found in time.
            StorageError: they cannot be looked for now.
        """
        with self._checking:
            process = self.take()
            try:
                process.ask("check", {"run": run_json(run)}, limit_s=self._check_s)
            except TookTooLongError as error:
                too_long = f"its check took more than {self._check_s:g} s; make the file simpler"
                raise RunFileError("run file", [too_long]) from error
            except ProcessLostError as error:
                raise StorageError(f"{error}; submit the run again") from error
            finally:
                self.give_back(process)

    def close(self) -> None:
        """End all of them; who waits for one is let go."""
        with self._lock:
            taken, idle, self._idle = list(self._taken), self._idle, None
        for process in taken:
            process.kill()
        if idle is not None:
            idle.close()
