"""Where work is done: in this process, or in worker processes forked from it.

Forked workers share the pages of whatever the parent loaded before (the base model, the rows). Every worker
computes with one torch thread, so results don't depend on how many there are.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import psutil
import torch

from fedpeft.errors import FederationError, StorageError

Result = TypeVar("Result")

_LARGE = 1 << 15  # bytes from which a value goes through a file instead of a pipe
_KEPT = 4  # shared values; a task takes at most the newest one of its round and one to evaluate
_ROOMY = 4 << 30  # free bytes that memory must have to be used instead of the disk
_PREFIX = "fedpeft-"


class Shared(Protocol):
    """A value that many tasks take, sent to each process once."""

    def get(self) -> Any:
        """The value."""
        ...


class Workers(Protocol):
    """A place to run functions."""

    @property
    def width(self) -> int:
        """How many run at a time."""
        ...

    def share(self, value: Any) -> Shared:
        """Prepare a value that several tasks take."""
        ...

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run ``function(*args)``; module-level functions and picklable arguments only."""
        ...

    def close(self) -> None:
        """Let running work finish and end the processes; nothing is left behind."""
        ...

    def abort(self) -> None:
        """End the processes now, whatever they are doing; nothing is left behind."""
        ...


class _Held:
    """A shared value of this very process."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        return self._value


class InlineWorkers:
    """No processes: `submit` returns when the work is done."""

    width = 1

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def share(self, value: Any) -> Shared:
        """The value itself."""
        return _Held(value)

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run at once; an exception is kept in the future."""
        future: Future[Result] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing to end."""

    def abort(self) -> None:
        """Nothing to end."""


class _Filed:
    """A shared value in a file of the pool's own folder; read once per process."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self) -> Any:
        return _load(self._path)


@functools.lru_cache(maxsize=2)
def _load(path: str) -> Any:
    """Unpickle a file that this run's own processes wrote into their private folder."""
    return pickle.loads(Path(path).read_bytes())


@dataclass(frozen=True)
class _Parcel:
    """A large result in a file; a pipe would pass it on in pieces, two processes waking each other."""

    path: str

    def unpack(self) -> Any:
        path = Path(self.path)
        value = pickle.loads(path.read_bytes())
        path.unlink()
        return value


def _call(folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """In a worker: the function's result, or a parcel with it."""
    result = function(*args)
    pickled = pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
    if len(pickled) < _LARGE:
        return result
    handle, path = tempfile.mkstemp(prefix="result-", dir=folder)
    with os.fdopen(handle, "wb", buffering=0) as file:
        file.write(pickled)
    return _Parcel(path)


class ProcessWorkers:
    """Worker processes. Create them after what they should share is loaded, before any thread starts."""

    def __init__(self, width: int) -> None:
        self.width = width
        torch.set_num_threads(1)  # a parent that never had a thread pool can be forked safely
        self.folder = _new_folder()
        self._count = 0
        self._files: list[Path] = []
        gc.freeze()  # the collector's own writes would copy the shared pages
        method = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        self._pool = ProcessPoolExecutor(
            width, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
        )
        others = set(multiprocessing.active_children())
        self.submit(os.getpid).result()  # starts the processes now
        self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def share(self, value: Any) -> Shared:
        """Pickle once; large values go to a file, of which the newest few are kept."""
        pickled = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        if len(pickled) < _LARGE:
            return _Held(value)
        self._count += 1
        path = self.folder / str(self._count)
        try:
            path.write_bytes(pickled)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(
                f"{self.folder}: {len(pickled)} bytes cannot be written ({error.strerror}); free space or"
                " set TMPDIR"
            ) from error
        self._files.append(path)
        while len(self._files) > _KEPT:
            self._files.pop(0).unlink(missing_ok=True)
        return _Filed(str(path))

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run in a worker process.

        Raises:
            FederationError: a worker process has died.
        """
        try:
            return self._pool.submit(_call, self.folder, function, args)
        except BrokenProcessPool as error:
            raise worker_died() from error

    def close(self) -> None:
        """Cancel what waits, let the rest finish, end the processes, delete the shared values."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def abort(self) -> None:
        """Terminate the processes, then as `close`."""
        for process in self._processes:
            process.terminate()
        self.close()


def worker_died() -> FederationError:
    """The error for a worker process that ended by itself."""
    return FederationError(
        "a worker process died (killed, or out of memory); resume the run with fewer --workers or a"
        " smaller training.batch_size"
    )


def result_of(future: Future[Result]) -> Result:
    """The future's result, a dead worker as one of our errors.

    Raises:
        FederationError: the worker process died.
    """
    try:
        result = future.result()
    except BrokenProcessPool as error:
        raise worker_died() from error
    return result.unpack() if isinstance(result, _Parcel) else result


def _new_folder() -> Path:
    """A private folder for shared values and results, in memory where there is room; abandoned ones go."""
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


def _start_worker(parent: int) -> None:
    """Settings of a worker process: one thread, Ctrl-C is the parent's business, end with the parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Leave when the parent is gone: after kill -9 nobody else would end this process."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
