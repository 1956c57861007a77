"""The worker process: it dies, eats and dawdles without taking the agent along."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedpeft.errors import MemoryLimitError, TimeLimitError, WorkerError
from fedpeft.runtime.frames import Frame
from fedpeft.transport.record_bytes import content_bytes, content_of
from fedpeft.transport.tasks import TRAIN, Task, task_content
from fedpeft_client.policy.owner_policy import Policy
from fedpeft_client.workers.worker_process import Bounds, WorkerProcess
from tests.server.fleet import APP, RUN, answer, collected, fleet, messages, reason, server, wait_for


def order(state: bytes, memory: bytes = b"") -> Frame:
    header = {
        "app": APP,
        "kind": TRAIN,
        "group": "1",
        "run_digest": "",
        "device_task": "",
        "client": "site-a",
        "data": "",
        "model": "",
        "base_digests": [],
    }
    return Frame(header, {"content": content_bytes(task_content(Task("d", 1, state))), "memory": memory})


def update(answered: Frame) -> dict[str, Any]:
    assert answered.header["error"] is None
    return dict(content_of(answered.parts["content"], who="worker").config_records["update"])


def lived(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_one_process_does_all_orders_and_remembers_through_them() -> None:
    async def live() -> None:
        workshop = WorkerProcess(Bounds())
        first = await workshop.do(order(b"one"))
        second = await workshop.do(order(b"two", first.parts["memory"]))
        assert update(first)["payload"] == b"one"
        assert update(second)["asked"] == 2
        assert update(first)["pid"] == update(second)["pid"]
        failed = await workshop.do(order(b"fail"))
        assert failed.header["error"] == {"class": "ZeroDivisionError", "text": "a bug in the client"}
        assert workshop.started == 1
        await workshop.release()
        assert update(await workshop.do(order(b"three")))["pid"] != update(first)["pid"]
        assert workshop.started == 2
        await workshop.close()

    lived(live())


def test_a_dead_worker_is_an_error_and_another_one_starts(tmp_path: Path) -> None:
    async def live() -> None:
        workshop = WorkerProcess(Bounds())
        with pytest.raises(WorkerError, match=r"the worker process died \(exit code 3\)"):
            await workshop.do(order(f"die:{tmp_path / 'died'}".encode()))
        again = await workshop.do(order(f"die:{tmp_path / 'died'}".encode()))
        assert update(again)["client"] == "site-a"
        await workshop.close()

    lived(live())


AGENT = """
import asyncio
from fedpeft_client.workers.worker_process import Bounds, WorkerProcess
from tests.client.test_workshop import order, update

async def live():
    workshop = WorkerProcess(Bounds())
    print(update(await workshop.do(order(b"ready")))["pid"], flush=True)
    await workshop.do(order(b"sleep:60"))

asyncio.run(live())
"""


@pytest.mark.slow
def test_a_worker_at_work_ends_with_its_killed_agent() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", AGENT], stdout=subprocess.PIPE, env=environment) as agent:
        assert agent.stdout is not None
        worker = psutil.Process(int(agent.stdout.readline()))
        time.sleep(0.5)
        assert worker.status() != psutil.STATUS_ZOMBIE
        agent.kill()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 15.0)


def test_bounds_end_a_worker() -> None:
    async def live() -> None:
        slow = WorkerProcess(Bounds(seconds=0.5))
        with pytest.raises(TimeLimitError, match=r"took longer than policy.max_task_s = 0.5"):
            await slow.do(order(b"sleep:30"))
        greedy = WorkerProcess(Bounds(memory_mib=600))
        with pytest.raises(MemoryLimitError, match=r"policy.max_memory_mib is 600"):
            await greedy.do(order(b"eat:800"))
        assert greedy.peak_mib > 600
        await slow.close()
        await greedy.close()

    lived(live())


def test_a_worker_that_dies_in_a_round_costs_its_agents_update_only(tmp_path: Path) -> None:
    with (
        server() as running,
        fleet(running.address, ["site-a", "site-b"], tmp_path, processes=True) as agents,
    ):
        grid = running.grid(RUN)
        wait_for(lambda: len(grid.agents_here) == 2)
        mark = f"died-in-{tmp_path.name}"  # each worker's own: it writes to its scratch folder alone
        ids = list(grid.push_messages(messages(grid, ["site-a", "site-b"], f"die:{mark}".encode())))
        replies = collected(grid, ids, 60.0)
        failed = [reason(reply) for reply in replies if reply.has_error()]
        assert len(failed) == 2
        assert all("the process that worked on the task died ('worker')" in why for why in failed)
        again = list(grid.send_and_receive(messages(grid, ["site-a", "site-b"], b"hi", 2), timeout=60.0))
        assert sorted(answer(reply)["client"] for reply in again) == ["site-a", "site-b"]
        assert all(agent.workshop.started <= 2 for agent in agents.values())  # type: ignore[attr-defined]
    status = [json.loads((tmp_path / name / "status.json").read_text()) for name in agents]
    assert sum(s["failures"] for s in status) == len(failed)
    assert any("exit code 3" in s["last_error"] for s in status)


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_round_costs_nothing(tmp_path: Path) -> None:
    """Its task is done again; one that is killed each time is an error in the end."""
    with server() as running, fleet(running.address, ["site-a"], tmp_path, processes=True) as agents:
        workshop = agents["site-a"].workshop
        assert isinstance(workshop, WorkerProcess)
        grid, killed = running.grid(RUN), list[int]()
        wait_for(lambda: len(grid.agents_here) == 1)
        for number, kills in ((1, 1), (2, 2)):
            ids = list(grid.push_messages(messages(grid, ["site-a"], b"sleep:1.5", number)))
            for _ in range(kills):
                wait_for(lambda: agents["site-a"].status.doing.startswith("train"))
                wait_for(lambda: workshop.pid not in (None, *killed), 30.0)
                time.sleep(0.3)
                killed.append(workshop.pid or 0)
                os.kill(killed[-1], signal.SIGKILL)
            (reply,) = collected(grid, ids, 60.0)
            assert reply.has_error() == (kills == 2)


def test_a_worker_killed_by_the_system_says_so() -> None:
    async def live() -> None:
        workshop = WorkerProcess(Bounds())
        pid = update(await workshop.do(order(b"")))["pid"]
        asyncio.get_running_loop().call_later(0.3, os.kill, pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="SIGKILL, perhaps out of memory"):
            await workshop.do(order(b"sleep:20"))
        await workshop.close()

    lived(live())


def test_refusals_are_shown_at_both_ends(tmp_path: Path) -> None:
    policy = Policy(max_bytes_per_day=100)
    with server() as running, fleet(running.address, ["site-a"], tmp_path, policy=policy):
        grid = running.grid(RUN)
        wait_for(lambda: grid.agents_here)
        (reply,) = grid.send_and_receive(messages(grid, ["site-a"], b"x" * 500))
        assert reason(reply).endswith("site-a: refused by the agent's policy: policy.max_bytes_per_day")
        (status,) = running.agents()
        assert status.refusals == 1
        assert "max_bytes_per_day" in status.last_refusal
    kept = json.loads((tmp_path / "site-a" / "status.json").read_text())
    assert kept["refusals"] == 1
    assert "policy.max_bytes_per_day = 100" in kept["last_refusal"]


def test_an_owner_may_tell_a_number_of_its_policy(tmp_path: Path) -> None:
    policy = Policy(max_bytes_per_day=100, tell_limits=("max_bytes_per_day",))
    with server() as running, fleet(running.address, ["site-a"], tmp_path, policy=policy):
        grid = running.grid(RUN)
        wait_for(lambda: grid.agents_here)
        (reply,) = grid.send_and_receive(messages(grid, ["site-a"], b"x" * 500))
        assert reason(reply).endswith("policy.max_bytes_per_day (100)")


def test_a_withdrawn_training_is_left_and_its_worker_kept(tmp_path: Path) -> None:
    """A task of half a minute is withdrawn; the next one is done at once, by the same process."""
    with server() as running, fleet(running.address, ["site-a"], tmp_path, processes=True) as agents:
        workshop = agents["site-a"].workshop
        assert isinstance(workshop, WorkerProcess)
        grid = running.grid(RUN)
        wait_for(lambda: len(grid.agents_here) == 1)
        (first,) = grid.send_and_receive(messages(grid, ["site-a"], b"hi", 1), timeout=60.0)
        ids = list(grid.push_messages(messages(grid, ["site-a"], b"steps:1500", 2)))
        wait_for(lambda: agents["site-a"].status.doing == "train, round 2")
        time.sleep(0.2)
        grid.cancel(ids)
        (last,) = grid.send_and_receive(messages(grid, ["site-a"], b"hi", 3), timeout=25.0)
        assert (answer(last)["pid"], workshop.started) == (answer(first)["pid"], 1)
        assert answer(last)["asked"] == 2, "the task in between left no memory"
    status = json.loads((tmp_path / "site-a" / "status.json").read_text())
    assert (status["results"], status["failures"]) == (2, 0)


def test_a_worker_that_is_still_starting_survives_a_withdrawal() -> None:
    async def live() -> None:
        workshop = WorkerProcess(Bounds())
        work = asyncio.create_task(workshop.do(order(b"hi")))
        while workshop.pid is None:
            await asyncio.sleep(0.001)
        await workshop.interrupt()
        assert update(await work)["asked"] == 1
        await workshop.interrupt()  # between two orders it is about neither
        assert update(await workshop.do(order(b"steps:1")))["asked"] == 1
        await workshop.close()

    lived(live())
