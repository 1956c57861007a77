"""What an agent keeps on its disk: results, stage memory, what was spent; and what it says to its worker."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import StateError
from fedpeft.runtime.frames import Frame, pack, read_frame
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.policy.usage import RunUsage, UsageBook
from fedpeft_client.transport.dialing import FIRST_PAUSE_S, LONGEST_PAUSE_S, pauses
from fedpeft_client.transport.outbox import Outbox, OutboxResult
from fedpeft_client.workers.replicas import ReplicaShelf
from fedpeft_client.workers.stage_memory import Remembered, StageMemory, memory_bytes, memory_of
from fedpeft_client.workers.start_cache import StartShelf


def finished(number: int, body: bytes = b"body") -> OutboxResult:
    return OutboxResult(pb.Task(id=number.to_bytes(16, "big"), run="r", round=number), body)


def test_results_survive_a_restart_and_the_oldest_go_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for number in range(70):
        outbox.put(finished(number, bytes([number])))
    again = Outbox(tmp_path)
    kept = [number for number in range(70) if number.to_bytes(16, "big") in again]
    assert kept == list(range(6, 70))
    last = again.get((69).to_bytes(16, "big"))
    assert last == finished(69, bytes([69]))
    again.drop(last.task.id)
    assert last.task.id not in Outbox(tmp_path)


def test_a_damaged_result_is_none(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(finished(1))
    (file,) = tmp_path.glob("*.result")
    file.write_bytes(b"\x01")
    assert outbox.get((1).to_bytes(16, "big")) is None
    assert (1).to_bytes(16, "big") not in outbox


def test_memory_of_a_task_done_again_is_that_before_it(tmp_path: Path) -> None:
    first, second = (memory_bytes({"residual": np.full(3, value)}) for value in (1.0, 2.0))
    memory = StageMemory(tmp_path)
    memory.put("run", Remembered("task-1", b"", first))
    memory.put("run", Remembered("task-2", first, second))
    kept = StageMemory(tmp_path).get("run")
    assert kept.for_task("task-2") == first
    assert kept.for_task("task-3") == second
    np.testing.assert_array_equal(memory_of(kept.for_task("task-3"))["residual"], np.full(3, 2.0))
    assert kept.without("task-2").for_task("task-3") == first
    assert kept.without("task-1") is kept
    assert StageMemory(tmp_path).get("another run") == Remembered()


def test_a_run_that_remembers_nothing_leaves_no_file(tmp_path: Path) -> None:
    memory = StageMemory(tmp_path)
    memory.put("run", Remembered("t", b"", memory_bytes({"a": np.ones(1)})))
    memory.put("run", Remembered())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_memory_is_said_to_be(tmp_path: Path) -> None:
    StageMemory(tmp_path).put("run", Remembered("t", b"", memory_bytes({"a": np.ones(4)})))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(StateError, match="the memory of a run is corrupt"):
        StageMemory(tmp_path).get("run")


def test_what_was_done_survives_and_adds_up(tmp_path: Path) -> None:
    book = UsageBook(tmp_path / "usage.json")
    book.usage.runs["a"] = RunUsage(name="a", rows="ab" * 32)
    book.count_bytes("2030-01-01", up=3, down=4)
    book.count_bytes("2030-01-02", up=5)
    book.save()
    usage = UsageBook(tmp_path / "usage.json").usage
    assert usage.runs["a"] == RunUsage(name="a", rows="ab" * 32)
    assert (usage.bytes_up, usage.bytes_down, usage.bytes_today) == (8, 4, 5)
    assert (tmp_path / "usage.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "usage.json").write_text("{}{")
    with pytest.raises(StateError, match=r"usage\.json is corrupt"):
        UsageBook(tmp_path / "usage.json")


def test_what_an_earlier_version_booked_stays_booked(tmp_path: Path) -> None:
    run = {"name": "a", "kind": "local", "epsilon": 2.0, "rounds": 1, "last_round": 1}
    runs = {"one": run, "two": run | {"epsilon": 0.5}, "three": run | {"kind": "", "epsilon": None}}
    (tmp_path / "usage.json").write_text(json.dumps({"version": 1, "results": 3, "runs": runs}))
    usage = UsageBook(tmp_path / "usage.json").usage
    assert (usage.promised_epsilon, usage.results) == (2.5, 3)
    assert usage.runs["one"] == RunUsage(name="a", rounds=1, last_round=1, trained=True)
    (tmp_path / "usage.json").write_text(json.dumps({"version": 1, "runs": [3]}))
    with pytest.raises(StateError, match=r"usage\.json is corrupt"):
        UsageBook(tmp_path / "usage.json")


@given(
    header=st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.booleans(), max_size=4),
    parts=st.dictionaries(st.text(max_size=8), st.binary(max_size=200), max_size=4),
)
def test_frames_come_out_as_they_went_in(header: dict[str, str | bool], parts: dict[str, bytes]) -> None:
    frame = Frame(header, parts)
    assert read_frame(io.BytesIO(pack(frame) * 2)) == frame
    assert read_frame(io.BytesIO(b"")) is None


def test_pauses_grow_to_a_minute_and_are_never_the_same_for_all() -> None:
    drawn = [list(itertools.islice(pauses(random.Random(seed)), 40)) for seed in range(200)]
    for step, bound in enumerate(min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(40)):
        column = [row[step] for row in drawn]
        assert 0.0 <= min(column) < 0.1 * bound
        assert 0.9 * bound < max(column) <= bound


def test_the_memories_of_old_runs_go(tmp_path: Path) -> None:
    """Neither the process nor the disk fills up with runs; those of the newest runs stay."""
    memory = StageMemory(tmp_path)
    for number in range(40):
        memory.put(f"run-{number}", Remembered("t", b"", memory_bytes({"a": np.full(4, number)})))
        os.utime(tmp_path / f"run-{number}.memory", ns=(number, number))  # the clock may be too coarse
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / f"run-{number}.memory" for number in range(8, 40))
    assert len(memory._known) <= 2
    assert memory_of(memory.get("run-8").after)["a"].tolist() == [8] * 4
    assert memory.get("run-7") == Remembered()


def test_a_home_that_others_can_read_is_refused(tmp_path: Path) -> None:
    home, settings = tmp_path / "home", ClientSettings(server="127.0.0.1:9", data=tmp_path, insecure=True)
    home.mkdir()
    home.chmod(0o750)
    with pytest.raises(StateError, match=f"its mode is 0750, .* run: chmod 700 '{home}'"):
        Agent(settings, "north", home, None)
    assert list(home.iterdir()) == []


def test_what_an_agent_keeps_is_in_private_folders(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Outbox(tmp_path / "outbox").put(finished(1))
        StageMemory(tmp_path / "memory").put(
            "run", Remembered("task-1", b"", memory_bytes({"a": np.ones(1)}))
        )
        StartShelf(tmp_path / "starts").put("ab" * 32, b"start")
        ReplicaShelf(tmp_path / "replicas").put("ab" * 32, {"a": np.ones(1)})
    finally:
        os.umask(before)
    for folder in tmp_path.iterdir():
        assert folder.stat().st_mode & 0o777 == 0o700, folder
