"""The agent's side of the resident worker: starting it, giving it orders, and outliving its death."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil

from fedpeft.errors import FedPEFTError, MemoryLimitError, TimeLimitError, WorkerError
from fedpeft.runtime.cancellation import INTERRUPT
from fedpeft.runtime.child_environment import child_environment
from fedpeft.runtime.crash_points import ONCE
from fedpeft.runtime.files import storage
from fedpeft.runtime.frames import HEAD_BYTES, Frame, pack, sizes_of, unpack
from fedpeft_client.workers.confinement import Allowed

CLIENT_APP = "fedpeft.flower.device_app:app"
# Folders of an agent's home that workers write to.
STARTS, REPLICAS, SCRATCH = "starts", "replicas", "scratch"
CACHES = {"NUMBA_CACHE_DIR": "numba", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "torch"}
_WATCH_S = 0.25
_MIB = 1 << 20


class WorkerKilledError(WorkerError):
    """A signal ended the worker: something outside the order, which is worth a second attempt."""


@dataclass(frozen=True)
class Bounds:
    """What one task may take; None: as much as it wants."""

    seconds: float | None = None
    memory_mib: float | None = None


@dataclass(frozen=True)
class WorkerPlace:
    """What a worker is left of the machine: its rows, its model and some folders of the agent's home.

    Attributes:
        model: folder of the base model; empty: it is the embedded one, or in the hub's cache.
    """

    home: Path
    data: Path
    model: str = ""

    def build_allowed(self, download: bool) -> Allowed:
        """Return it as what the worker does not give up; folders that it writes to are made.

        Raises:
            StorageError: they cannot be made.
        """
        own = [self.home / name for name in (STARTS, REPLICAS, SCRATCH)]
        with storage(self.home):
            for folder in (*own, self.home / SCRATCH / "tmp"):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = [str(folder.resolve()) for folder in own]
        hub = _hub_folders()
        readable = [str(self.data.resolve()), *([str(Path(self.model).resolve())] if self.model else [])]
        writable += [os.environ[name] for name in CACHES if os.environ.get(name)]
        if marker := os.environ.get(ONCE):  # a test's; see `fedpeft.runtime.crash_points`
            writable.append(str(Path(marker).parent))
        (writable if download else readable).extend(hub)
        if download:
            with storage(Path(hub[0])):
                for name in hub:
                    Path(name).mkdir(parents=True, exist_ok=True)
        return Allowed(tuple(readable), tuple(writable), download, str(self.home.resolve()))

    def environment(self) -> dict[str, str]:
        """Return the variables that tell libraries where they may write, and that there is no token."""
        scratch = self.home.resolve() / SCRATCH
        own = {name: str(scratch / folder) for name, folder in CACHES.items() if name not in os.environ}
        return own | {"TMPDIR": str(scratch / "tmp"), "HF_TOKEN_PATH": str(scratch / "no-token")}


class Worker(Protocol):
    """Where an agent's orders are carried out."""

    async def do(self, order: Frame) -> Frame:
        """Give an order and wait for its answer.

        Raises:
            WorkerError, MemoryLimitError, TimeLimitError: there will be none.
        """
        ...

    async def interrupt(self) -> None:
        """The answer to the order that is under way is not wanted; it may come early, as an error."""
        ...

    async def release(self) -> None:
        """Give back what is held between orders, once none is under way."""
        ...

    async def close(self) -> None:
        """End at once."""
        ...


class WorkerProcess:
    """At most one worker process, started when there is work.

    Args:
        bounds: a worker that exceeds them is ended.
        download: whether a worker may fetch what a run names from the hub.
        variables: of the environment, that a worker gets beside those that `child_environment` names.
        needs_confinement: whether a worker that could not give up the rest refuses its orders.
        place: what a worker is left of the machine; None: everything, for tests of workers alone.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        download: bool = False,
        needs_confinement: bool = False,
        variables: Collection[str] = (),
        place: WorkerPlace | None = None,
    ) -> None:
        self._bounds, self._download, self._place = bounds, download, place
        self._needs_confinement, self._variables = needs_confinement, variables
        self._process: subprocess.Popen[bytes] | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._busy = asyncio.Lock()
        self.started = 0
        self.peak_mib = 0.0

    async def do(self, order: Frame) -> Frame:
        """Give an order and wait for its answer.

        Raises:
            WorkerKilledError: a signal ended the worker.
            WorkerError: it died otherwise.
            MemoryLimitError, TimeLimitError: it was ended for exceeding its bounds. The next order starts
                another.
        """
        async with self._busy:
            reader, writer = await self._running()
            answer = asyncio.create_task(_exchange(reader, writer, order))
            watch = asyncio.create_task(self._watch())
            try:
                done, _ = await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
                if watch in done:
                    await self._end()
                    raise watch.result()
                return answer.result()
            except (asyncio.IncompleteReadError, OSError) as error:
                died = f"the worker process died ({self._epitaph()}); it is started anew"
                kind = WorkerKilledError if self._was_killed() else WorkerError
                raise kind(died) from error
            except asyncio.CancelledError:
                await self._end()
                raise
            finally:
                answer.cancel()
                watch.cancel()

    @property
    def pid(self) -> int | None:
        """The worker's, if one was started and not ended by us."""
        return None if self._process is None else self._process.pid

    async def interrupt(self) -> None:
        """Let the worker leave its order at the next step of training; what it has loaded stays loaded."""
        if self._busy.locked() and self._process is not None and self._process.poll() is None:
            self._process.send_signal(INTERRUPT)

    async def release(self) -> None:
        """End the worker once it is idle, and with it what it holds; the next order starts another."""
        async with self._busy:
            await self._end()

    async def close(self) -> None:
        """End the worker now."""
        await self._end()

    async def _running(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and self._process is not None and self._process.poll() is None:
            return self._streams
        await self._end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                self._words(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._environment(),
                start_new_session=True,  # a terminal's Ctrl-C is the agent's to handle
            )
        self.started += 1
        self._streams = await asyncio.open_connection(sock=ours)
        return self._streams

    def _environment(self) -> dict[str, str]:
        place = self._place.environment() if self._place is not None else {}
        offline = {} if self._download else {"HF_HUB_OFFLINE": "1"}
        return child_environment(self._variables, network=self._download) | place | offline

    def _words(self, fd: int) -> list[str]:
        """The worker's command; modules are never looked for in the agent's working folder."""
        python = [sys.executable, "-P", "-m"]
        if self._place is None:
            return [*python, "fedpeft_client.workers.worker", str(fd)]
        allowed = self._place.build_allowed(self._download)
        needs = "needs-confinement" if self._needs_confinement else "takes-what-there-is"
        return [*python, "fedpeft_client.workers.confined", str(fd), json.dumps(asdict(allowed)), needs]

    async def _watch(self) -> FedPEFTError:
        """Return, when the worker exceeds a bound, the error that says which."""
        process = psutil.Process(self._process.pid) if self._process is not None else psutil.Process()
        begun = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                held = process.memory_info().rss / _MIB
            except psutil.Error:  # it has just died; whoever reads its answer notices
                held = 0.0
            self.peak_mib = max(self.peak_mib, held)
            if self._bounds.memory_mib is not None and held > self._bounds.memory_mib:
                return MemoryLimitError(
                    f"the task took {held:.0f} MiB and policy.max_memory_mib is {self._bounds.memory_mib:g};"
                    " its worker was ended"
                )
            took = asyncio.get_running_loop().time() - begun
            if self._bounds.seconds is not None and took > self._bounds.seconds:
                return TimeLimitError(
                    f"the task took longer than policy.max_task_s = {self._bounds.seconds:g}; it was ended"
                )

    def _epitaph(self) -> str:
        code = self._process.wait() if self._process is not None else 0
        if code < 0:
            name = signal.Signals(-code).name
            return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
        return f"exit code {code}"

    def _was_killed(self) -> bool:
        return self._process is not None and (self._process.returncode or 0) < 0

    async def _end(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            with contextlib.suppress(OSError):
                await self._streams[1].wait_closed()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._streams = None


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: Frame) -> Frame:
    writer.write(pack(order))
    await writer.drain()
    header, parts = sizes_of(await reader.readexactly(HEAD_BYTES))
    return unpack(await reader.readexactly(header), await reader.readexactly(parts))


def _hub_folders() -> tuple[str, str]:
    """Return where models of the hub and their pieces lie; not the folder above, which may hold a token."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    home = os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))
    own = (("HF_HUB_CACHE", "hub"), ("HF_XET_CACHE", "xet"))
    models, pieces = (
        os.path.expanduser(os.environ.get(key) or os.path.join(home, name)) for key, name in own
    )
    return models, pieces
