"""What a run file can do to the processes around it: they have limits, and a run that breaks them ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from fedpeft.config.run_file import build_run, run_digest, run_json
from fedpeft.errors import RunFileError
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import add_loaded_run, drop_loaded_run
from fedpeft_server.runs.control import Control, ProcessLostError, SteadyClock, Stopped
from fedpeft_server.runs.model_process_pool import ModelProcess, ModelProcessPool, TookTooLongError
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Rules, RunStatus, Store
from tests.server.in_memory_grid import InMemoryGrid, standins
from tests.server.test_models_apart import LONG_S, ROOT, tables

ENDLESS = "re.match('(a+)+$', 'a' * 60 + 'b')"  # holds the interpreter for longer than the sun will burn
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "server", "client"))


def started(script: str) -> subprocess.Popen[str]:
    """A Python process that has printed its first line."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script],
        env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def eventually(is_so: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_child_in_an_endless_native_call_ends_with_its_parent_and_not_with_the_thread_that_began_it() -> (
    None
):
    child = (
        "import os, re, sys\n"
        "from fedpeft.runtime.parent_exit import exit_with_parent\n"
        "exit_with_parent(int(sys.argv[1]))\n"
        "print(os.getpid(), flush=True)\n"
        f"{ENDLESS}\n"
    )
    parent = started(
        "import os, sys, threading, time\n"
        "from fedpeft.runtime.parent_exit import start_child\n"
        f"words = [sys.executable, '-c', {child!r}, str(os.getpid())]\n"
        "thread = threading.Thread(target=start_child, args=(words,))\n"
        "thread.start(); thread.join(); time.sleep(600)\n"
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(1.0)  # the thread that asked for the child has long ended
    assert not gone(pid)
    parent.kill()
    parent.communicate()
    try:
        assert eventually(lambda: gone(pid))
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_signal_ends_a_process_whose_interpreter_is_held() -> None:
    process = started(
        "import re, signal\n"
        "from fedpeft_server.ops.end_watch import end_within\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        f"with end_within(1.0):\n    print('ready')\n    {ENDLESS}\n"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    try:
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert "not at its end 1 s after the signal" in said


def test_a_process_that_ends_in_time_is_let_alone() -> None:
    process = started(
        "import signal, threading\n"
        "from fedpeft_server.ops.end_watch import end_within\n"
        "told = threading.Event()\n"
        "signal.signal(signal.SIGTERM, lambda *_: told.set())\n"
        "with end_within(30.0):\n    print('ready')\n    told.wait()\n"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    watchers = [child.pid for child in psutil.Process(process.pid).children()]
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said, len(watchers)) == (0, "", 1)
    assert eventually(lambda: gone(watchers[0]))


@pytest.mark.slow
def test_a_process_that_stands_still_is_ended_in_time_and_the_next_order_gets_another() -> None:
    order = {"run": run_json(build_run(tables(), source="test"))}
    with closing(ModelProcess(60.0, LONG_S)) as process:
        process.ask("check", order)
        stuck = process.pid
        assert stuck is not None
        os.kill(stuck, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(TookTooLongError, match="for 1 s and was ended"):
            process.ask("check", order, limit_s=1.0)
        assert time.monotonic() - began < LONG_S / 4
        assert gone(stuck)
        process.ask("check", order)
        assert process.pid not in (None, stuck)


@pytest.mark.slow
def test_a_check_that_takes_too_long_is_a_refusal_and_holds_up_nobody_else() -> None:
    with (
        closing(ModelProcessPool(60.0, check_s=0.05)) as room,
        pytest.raises(RunFileError, match=r"more than 0\.05 s"),
    ):
        room.check(build_run(tables(), source="test"))


def test_a_stop_before_or_while_a_process_works_ends_the_wait() -> None:
    control, killed = Control(SteadyClock()), threading.Event()
    threading.Timer(0.1, lambda: control.halt(Stopped("enough"))).start()

    def work() -> None:
        with control.kill_on_stop(killed.set):
            assert killed.wait(LONG_S)
            raise ProcessLostError("killed")

    with pytest.raises(Stopped, match="enough"):
        work()
    killed.clear()
    with pytest.raises(Stopped, match="enough"):
        work()
    assert not killed.is_set()
    control.take_halt()
    with control.kill_on_stop(killed.set):
        pass


@contextmanager
def seized(room: ModelProcessPool, number: signal.Signals, while_: Callable[[], bool]) -> Iterator[None]:
    """Send a signal to each process that the room gives out, as soon as it runs."""
    ended, seen = threading.Event(), set()

    def work() -> None:
        while not ended.wait(0.01):
            for process in tuple(room._taken):
                pid = process.pid
                if pid is not None and pid not in seen and while_():
                    seen.add(pid)
                    os.kill(pid, number)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_a_run_that_takes_its_process_down_twice_is_set_aside_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    hostile = build_run(tables(), source="test")
    sound = build_run(tables(run={"name": "sound", "rounds": 1}), source="test")
    grids: list[InMemoryGrid] = []
    with Store(tmp_path / "state") as store, closing(ModelProcessPool(60.0)) as room:
        supervisor = Supervisor(store, standins(store, grids), models=room)
        first = store.runs.submit(hostile, Rules(), submission="one", submitter="me")
        second = store.runs.submit(sound, Rules(), submission="two", submitter="me")
        add_loaded_run(load_simulated_run(sound))

        def hostile_runs() -> bool:
            return store.runs.get(second.id).status == RunStatus.QUEUED

        try:
            with seized(room, signal.SIGKILL, hostile_runs):
                supervisor.start()
                assert supervisor.wait_idle(2 * LONG_S)
        finally:
            drop_loaded_run(run_digest(sound))
        aside, finished = store.runs.get(first.id), store.runs.get(second.id)
    assert aside.status == RunStatus.FAILED
    assert re.match(
        "set aside, as its model's process was lost 2 times at one point: .*SIGKILL", aside.reason
    )
    assert finished.status == RunStatus.FINISHED, finished.reason


@pytest.mark.slow
def test_an_expression_without_end_is_refused_and_in_a_queued_run_holds_up_nobody(tmp_path: Path) -> None:
    """A submitter's is no name, and agents take names alone; the state of an older version may hold one."""
    adapter = {"method": "lora", "r": 2, "target_modules": "(.|..|...|....|.....)+[!-]"}
    hostile = build_run(tables(peft=adapter), source="test")
    sound = build_run(tables(run={"name": "sound", "rounds": 1}), source="test")
    with Store(tmp_path / "state") as store, closing(ModelProcessPool(60.0)) as room:
        supervisor = Supervisor(store, standins(store, []), models=room)
        with pytest.raises(RunFileError, match=r"peft\.target_modules"):
            supervisor.submit(hostile, Rules(), submission="refused", submitter="me")
        first = store.runs.submit(hostile, Rules(), submission="one", submitter="me")
        second = store.runs.submit(sound, Rules(), submission="two", submitter="you")
        add_loaded_run(load_simulated_run(sound))
        try:
            supervisor.start()
            assert supervisor.wait_idle(2 * LONG_S)
        finally:
            drop_loaded_run(run_digest(sound))
        failed, finished = store.runs.get(first.id), store.runs.get(second.id)
    assert failed.status == RunStatus.FAILED
    assert "peft.target_modules" in failed.reason
    assert finished.status == RunStatus.FINISHED, finished.reason


@pytest.mark.slow
def test_a_run_whose_process_stands_still_can_be_stopped(tmp_path: Path) -> None:
    grids: list[InMemoryGrid] = []
    with Store(tmp_path / "state") as store, closing(ModelProcessPool(60.0)) as room:
        supervisor = Supervisor(store, standins(store, grids), models=room)
        stored = store.runs.submit(
            build_run(tables(), source="test"), Rules(), submission="one", submitter="me"
        )
        with seized(room, signal.SIGSTOP, lambda: True):
            supervisor.start()
            assert eventually(lambda: any(process.pid is not None for process in tuple(room._taken)), LONG_S)
            time.sleep(0.5)
            stopped = supervisor.stop(stored.id, "enough of that")
        assert (stopped.status, stopped.reason) == (RunStatus.STOPPED, "enough of that")
        assert supervisor.wait_idle(LONG_S)


def test_a_stop_is_durable_before_it_acts(tmp_path: Path) -> None:
    """Also where the run's own thread never comes to the point at which it would hear of it."""
    let_go, grids = threading.Event(), list[InMemoryGrid]()
    with Store(tmp_path / "state") as store:

        def deaf(stored: object) -> None:
            assert let_go.wait(LONG_S)

        opened = standins(store, grids)

        @contextmanager
        def open_grid(stored: object) -> Iterator[InMemoryGrid]:
            with opened(stored) as grid:  # type: ignore[arg-type]  # of this store
                deaf(stored)
                yield grid

        first = Supervisor(store, open_grid)
        stored = first.submit(build_run(tables(), source="test"), Rules(), submission="one", submitter="me")
        assert first.stop(stored.id, "enough").status == RunStatus.STOPPING
        store.runs.set_status(stored.id, RunStatus.RUNNING)  # a word of its thread, which comes too late
        assert store.runs.get(stored.id).status == RunStatus.STOPPING
        second = Supervisor(store, standins(store, grids))  # as after a restart
        second.start()
        assert (store.runs.get(stored.id).status, store.runs.get(stored.id).reason) == (
            RunStatus.STOPPED,
            "enough",
        )
        let_go.set()
        assert first.wait_idle(LONG_S)
        assert store.runs.get(stored.id).status == RunStatus.STOPPED
