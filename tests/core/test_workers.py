"""Work in this process and in others: the same results, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedpeft.errors import FederationError, UpdateError
from fedpeft.workers import AHEAD, InlineWorkers, ProcessWorkers, Shared, open_workers


def product(seed: int, shared: Shared) -> bytes:
    """A matrix product, whose bits depend on how it is computed."""
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32))
    return (matrix @ torch.from_numpy(shared.get())).numpy().tobytes()


def threads_and_process() -> tuple[int, int]:
    return torch.get_num_threads(), os.getpid()


def identity_of(shared: Shared) -> tuple[int, int]:
    return os.getpid(), id(shared.get())


def refuse() -> None:
    raise UpdateError("refused in the worker")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("size", [64, 8])
def test_one_two_and_three_workers_give_the_same_bits(size: int) -> None:
    value = np.random.default_rng(1).standard_normal((64, size)).astype(np.float32)
    results = []
    for width in (1, 2, 3):
        with open_workers(width) as workers:
            assert workers.width == width
            shared = workers.share(value)
            results.append([f.result() for f in [workers.submit(product, s, shared) for s in range(6)]])
    assert results[0] == results[1] == results[2]
    assert len(set(results[0])) == 6


def test_every_worker_computes_with_one_thread() -> None:
    with open_workers(2) as workers:
        came = [workers.submit(threads_and_process).result() for _ in range(8)]
    assert {threads for threads, _ in came} == {1}
    assert os.getpid() not in {process for _, process in came}
    with open_workers(1) as inline:
        assert inline.submit(threads_and_process).result() == (1, os.getpid())


def test_a_large_value_is_read_once_per_process() -> None:
    with open_workers(2) as workers:
        shared = workers.share(np.zeros(1 << 16))
        came = [workers.submit(identity_of, shared).result() for _ in range(12)]
    assert len(set(came)) == len({process for process, _ in came})


@pytest.mark.parametrize("width", [1, 2])
def test_an_error_of_ours_comes_back_as_itself(width: int) -> None:
    with open_workers(width) as workers:
        with pytest.raises(UpdateError, match="refused in the worker"):
            workers.submit(refuse).result()
        assert workers.submit(os.getpid).result() > 0  # and the worker goes on


def test_a_killed_worker_is_one_line_and_leaves_nobody() -> None:
    before = set(psutil.Process().children(recursive=True))
    workers = ProcessWorkers(2)
    try:
        with pytest.raises(FederationError, match=r"a worker process died.*--workers"):
            workers.submit(die).result()
        with pytest.raises(FederationError, match="a worker process died"):
            workers.submit(os.getpid).result()
    finally:
        workers.close()
    assert wait_until(lambda: set(psutil.Process().children(recursive=True)) <= before)


def test_closing_ends_processes_and_deletes_shared_values() -> None:
    code = """
        from fedpeft.workers import ProcessWorkers, open_workers
        with open_workers(2) as workers:
            assert isinstance(workers, ProcessWorkers)
            workers.share(b"x" * 100_000)
            assert list(workers.folder.iterdir()) and workers.folder.stat().st_mode & 0o777 == 0o700
        assert not workers.folder.exists()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_large_results_come_whole_and_leave_nothing() -> None:
    workers = ProcessWorkers(1)
    try:
        came = workers.submit(np.arange, 1 << 17).result()
        assert came.tolist() == list(range(1 << 17))
        slots = sorted(workers.folder.iterdir())  # the memory that calls and results pass through
        assert {path.name for path in slots} == {f"slot-0-{index}" for index in range(AHEAD)}
        sizes = [path.stat().st_size for path in slots]
        for _ in range(2 * AHEAD):
            workers.submit(np.arange, 1 << 17).result()
        assert [path.stat().st_size for path in slots] == sizes
    finally:
        workers.close()


def test_folders_of_killed_processes_are_cleared() -> None:
    code = (
        "import os; from fedpeft.workers import ProcessWorkers\n"
        "print(ProcessWorkers(1).folder, flush=True); os._exit(1)"
    )
    abandoned = Path(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    )
    assert abandoned.is_dir()
    ProcessWorkers(1).close()
    assert not abandoned.exists()


def test_old_shared_values_are_forgotten() -> None:
    workers = ProcessWorkers(1)
    try:
        values = [workers.share(np.full(1 << 15, index)) for index in range(6)]
        assert workers.submit(total, values[5]).result() == 5 * (1 << 15)
        with pytest.raises(FileNotFoundError):
            workers.submit(total, values[0]).result()
    finally:
        workers.close()


def total(shared: Shared) -> Any:
    return int(shared.get().sum())


def test_workers_end_when_the_parent_is_killed() -> None:
    """After kill -9 of the parent nobody tells the workers; they notice."""
    code = """
        import os, time
        from fedpeft.workers import open_workers
        with open_workers(2) as workers:
            futures = [workers.submit(time.sleep, 0.2) for _ in range(2)]
            print(*(f for f in {workers.submit(os.getpid).result() for _ in range(8)}), flush=True)
            time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        workers = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
        assert workers
        everyone = psutil.Process(parent.pid).children(recursive=True)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    gone = wait_until(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in everyone)
    )
    for process in everyone:  # ours: never leave them to the machine
        if process.is_running():
            process.kill()
    assert gone


def test_inline_workers_keep_exceptions_in_the_job() -> None:
    job = InlineWorkers().submit(refuse)
    assert isinstance(job.exception(), UpdateError)
