"""Work in processes forked from this one.

The standard library's pool keeps two threads of its own, which compete with the caller for the interpreter
and wake it through two pipes per task. Here the caller's thread sends, waits and receives by itself: a
client's reply is a few milliseconds of work altogether, and half of it would be hand-over.
"""

from __future__ import annotations

import functools
import gc
import mmap
import multiprocessing
import os
import pickle
import selectors
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from fedpeft.errors import FederationError, StorageError
from fedpeft.workers.allocator import keep_freed_memory
from fedpeft.workers.base import InlineValue, Job, Result, Shared, Workers
from fedpeft.workers.child import STOP, Note, receive, send, work
from fedpeft.workers.inline import InlineWorkers
from fedpeft.workers.slots import Slot

_LARGE = 1 << 15  # bytes from which a shared value goes through a file of its own
_KEPT = 4  # shared values; a task takes at most the newest one of its round and one to evaluate
_ROOMY = 4 << 30  # free bytes that memory must have to be used instead of the disk
_PREFIX = "fedpeft-"
AHEAD = 3  # slots of a worker, and the most calls that it is sent
_BRISK_S = 0.02  # calls shorter than this are sent ahead: waking each other would cost as much as they do


class _Filed:
    """A shared value in a file of the pool's own folder; read once per process."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self) -> Any:
        return _load(self._path)


@functools.lru_cache(maxsize=2)
def _load(path: str) -> Any:
    """Unpickle a file that this run's own processes wrote into their private folder."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return pickle.loads(mapped)


@dataclass
class _Worker:
    """One process as its parent sees it."""

    process: BaseProcess
    connection: Connection
    slots: list[Slot]
    sent: dict[int, Job[Any]] = field(default_factory=dict)  # by slot

    def free_slot(self) -> int:
        return next(index for index in range(len(self.slots)) if index not in self.sent)


class ProcessWorkers:
    """Worker processes. Create them after what they should share is loaded, before any thread starts."""

    def __init__(self, width: int) -> None:
        self.width = width
        torch.set_num_threads(1)  # a parent that never had a thread pool can be forked safely
        keep_freed_memory()
        self.folder = _new_folder()
        self._shared = 0
        self._files: list[Path] = []
        self._waiting: deque[tuple[Job[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._ahead = 1
        self._broken = False
        gc.freeze()  # the collector's own writes would copy the shared pages
        self._selector = selectors.DefaultSelector()
        self._crew = [self._hire(number) for number in range(width)]

    def share(self, value: Any) -> Shared:
        """Pickle once; large values go to a file, of which the newest few are kept."""
        pickled = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        if len(pickled) < _LARGE:
            return InlineValue(value)
        self._shared += 1
        path = self.folder / str(self._shared)
        try:
            if len(self._files) == _KEPT:  # under another name, so that nobody takes it for what it was
                self._files.pop(0).rename(path)
            with open(path, "r+b" if path.exists() else "wb") as file:  # pages that are there save time
                file.write(pickled)
                file.truncate()
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(
                f"{self.folder}: {len(pickled)} bytes cannot be written ({error.strerror}); free space or"
                " set TMPDIR"
            ) from error
        self._files.append(path)
        return _Filed(str(path))

    def submit(self, function: Callable[..., Result], *args: Any) -> Job[Result]:
        """Run in the first worker process that is free.

        Raises:
            FederationError: a worker process has died.
            StorageError: no memory is left to hand the arguments over.
        """
        if self._broken:
            raise _worker_died()
        job: Job[Result] = Job(self._finish)
        self._waiting.append((job, function, args))
        self._send()
        return job

    def wait(self, jobs: Iterable[Job[Any]]) -> list[Job[Any]]:
        """Those of `jobs` that are done, a dead worker's among them; blocks until one is."""
        wanted = list(jobs)
        while wanted and not any(job.done for job in wanted):
            self._receive()
        return [job for job in wanted if job.done]

    def close(self) -> None:
        """Cancel what waits, let the rest finish, end the processes, delete the shared values."""
        self._waiting.clear()
        while any(worker.sent for worker in self._crew) and not self._broken:
            self._receive()
        for worker in self._crew:
            try:
                send(worker.connection, [STOP])
            except OSError:  # it is gone already
                continue
        self._dismiss()

    def abort(self) -> None:
        """Terminate the processes, then as `close`."""
        for worker in self._crew:
            worker.process.terminate()
        self._dismiss()

    def _hire(self, number: int) -> _Worker:
        linux = sys.platform == "linux"
        context = multiprocessing.get_context("fork") if linux else multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        paths = [self.folder / f"slot-{number}-{index}" for index in range(AHEAD)]
        slots = [Slot(path) for path in paths]
        process = context.Process(target=work, args=(os.getpid(), theirs, paths), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        worker = _Worker(process, ours, slots)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _dismiss(self) -> None:
        for worker in self._crew:
            worker.process.join()
            worker.process.close()
            worker.connection.close()
            for slot in worker.slots:
                slot.close()
        self._crew = []
        self._broken = True
        self._selector.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self) -> None:
        """Give waiting calls to the least busy workers, as far ahead as it pays."""
        notes: dict[int, list[Note]] = {}
        while self._waiting:
            place, worker = min(enumerate(self._crew), key=lambda entry: len(entry[1].sent))
            if len(worker.sent) >= self._ahead:
                break
            job, function, args = self._waiting.popleft()
            index = worker.free_slot()
            size = worker.slots[index].dump((function, args))
            worker.sent[index] = job
            notes.setdefault(place, []).append(Note(index, size, 0.0))
        try:
            for place, of_worker in notes.items():
                send(self._crew[place].connection, of_worker)
        except OSError:
            self._lose()

    def _receive(self) -> None:
        """Wait for whoever is done next."""
        for key, _ in self._selector.select():
            worker: _Worker = key.data
            try:
                notes = receive(worker.connection)
            except (EOFError, OSError):
                self._lose()
                return
            for index, size, seconds in notes:
                error, result = worker.slots[index].load(size)
                job = worker.sent.pop(index)
                if error is None:
                    job.finish(result)
                else:
                    job.fail(error)
                self._ahead = AHEAD if seconds < _BRISK_S else 1
        self._send()

    def _finish(self, job: Job[Any]) -> None:
        self.wait([job])

    def _lose(self) -> None:
        """A process is gone, and nobody knows what it had done: nothing that is under way will end."""
        self._broken = True
        under_way = [job for worker in self._crew for job in worker.sent.values()]
        for job in (*under_way, *(job for job, _, _ in self._waiting)):
            job.fail(_worker_died())
        for worker in self._crew:
            worker.sent.clear()
            worker.process.terminate()
        self._waiting.clear()


def _worker_died() -> FederationError:
    return FederationError(
        "a worker process died (killed, or out of memory); resume the run with fewer --workers or a"
        " smaller training.batch_size"
    )


def _new_folder() -> Path:
    """A private folder for slots and shared values, in memory where there is room; abandoned ones go."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ROOMY
    root = memory if roomy else Path(tempfile.gettempdir())
    for old in root.glob(f"{_PREFIX}*"):
        owner = old.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):  # its process was killed
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))


class open_workers:  # noqa: N801 - reads as the function that it is
    """``with open_workers(n) as workers``: inline for n = 1, processes beyond."""

    def __init__(self, width: int) -> None:
        self._workers: Workers = InlineWorkers() if width <= 1 else ProcessWorkers(width)

    def __enter__(self) -> Workers:
        return self._workers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._workers.close()
        else:  # an interrupted or failed run doesn't wait for work that nobody will use
            self._workers.abort()
