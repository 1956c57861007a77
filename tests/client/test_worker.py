"""What the worker does with an order of the real client app: loads this device's rows, checks the model."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run, run_digest, run_json
from fedpeft.errors import DataError, PolicyError, StateError
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.loaded_run import drop_loaded_run, get_loaded_run, has_loaded_run
from fedpeft.rounds.downlink.exact_steps import steps_of
from fedpeft.runtime.frames import Frame
from fedpeft.transport.record_bytes import content_bytes, content_of
from fedpeft.transport.tasks import HELLO, TRAIN, Task, task_content
from fedpeft.updates.update import arrays_digest
from fedpeft.wire.codec import Envelope, encode
from fedpeft.wire.failures import from_record
from fedpeft.wire.state_message import StateMessage, encode_state
from fedpeft_client.transport.egress import contents
from fedpeft_client.workers.replicas import ReplicaShelf
from fedpeft_client.workers.start_cache import StartShelf
from fedpeft_client.workers.worker import execute_order
from fedpeft_client.workers.worker_process import CLIENT_APP, Bounds, WorkerPlace, WorkerProcess

RUN = build_run(
    {
        "run": {"name": "t", "rounds": 1},
        "peft": {"method": "lora", "r": 2},
        "data": {"train": "nowhere", "prompt": "{prompt}", "answer": "{answer}", "heldout": 0.0},
    },
    source="test",
)
TASK = device_task(RUN)


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "site-a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} ", "answer": str(n)}) + "\n" for n in range(8)))
    yield path
    drop_loaded_run(TASK.digest)


def order(rows: Path, **header: Any) -> Frame:
    digest = TASK.digest
    standard = {
        "app": CLIENT_APP,
        "kind": HELLO,
        "group": "0",
        "run_digest": digest,
        "device_task": TASK.text,
        "client": "site-a",
        "data": str(rows),
        "model": "",
        "base_digests": [],
    }
    content = content_bytes(task_content(Task(digest, 0, b"", device_task=TASK.text)))
    return Frame(standard | header, {"content": content, "memory": b""})


def test_it_trains_on_its_own_rows_under_its_own_name(rows: Path) -> None:
    answered = execute_order(order(rows))
    assert answered.header["error"] is None
    hello = content_of(answered.parts["content"], who="worker").config_records["hello"]
    assert hello["client"] == "site-a"
    assert hello["examples"] == 8
    assert hello["base-digest"] == answered.header["base_digest"]
    pinned = execute_order(order(rows, base_digests=[answered.header["base_digest"]]))
    assert pinned.header["error"] is None
    other = execute_order(order(rows, base_digests=["ab" * 32]))
    refused = from_record(other.header["error"])
    assert isinstance(refused, PolicyError)
    assert refused.limits == {"base_digests": None}
    assert "which policy.base_digests does not name" in str(refused)


def test_the_owner_says_how_its_files_are_written(rows: Path, tmp_path: Path) -> None:
    """What would be found out of these bytes is another separator, or another encoding."""
    path = tmp_path / "site-a.csv"
    path.write_bytes("prompt|answer\nna\xedve, very;1 |2\nb, c;3 |4\n".encode("cp1250"))
    files = {"encoding": "cp1250", "separator": "|", "quoting": "none"}
    answered = execute_order(order(path, files=files))
    assert answered.header["error"] is None
    read = get_loaded_run(TASK.digest).data
    assert len(read.rows) == 2
    drop_loaded_run(TASK.digest)
    assert execute_order(order(path, files={"separator": ";"})).header["error"]["class"] == "DataError"


def test_another_task_than_announced(rows: Path) -> None:
    changed = TASK.text.replace('"rounds":1', '"rounds":9')
    answered = execute_order(order(rows, device_task=changed))
    assert answered.header["error"]["text"].startswith("what came is not what run ")


def test_a_message_of_another_run_than_the_one_that_was_let_in(rows: Path, tmp_path: Path) -> None:
    """Its own run file would have other rows read; that file is not even looked at."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"prompt": "p", "answer": "a"}\n')
    other = build_run(
        RUN.model_dump() | {"data": {**RUN.data.model_dump(), "train": str(secret)}}, source="t"
    )
    asked = Task(run_digest(other), 0, b"", run_json(other), device_task=device_task(other).text)
    content = content_bytes(task_content(asked))
    answered = execute_order(Frame(order(rows).header, {"content": content, "memory": b""}))
    assert answered.header["error"]["text"].startswith("a message of round 0 of run ")
    assert not has_loaded_run(run_digest(other))


def test_rows_that_cannot_be_read(rows: Path) -> None:
    rows.write_text('{"question": "1"}\n')
    answered = execute_order(order(rows))
    assert isinstance(from_record(answered.header["error"]), DataError)


HIDING = build_run(
    RUN.model_dump(mode="json")
    | {
        "federation": {"weighting": "uniform"},
        "training": {"steps": 1},
        "data": {"train": "nowhere", "prompt": "{prompt}", "answer": "{answer}", "max_length": 200},
        "privacy": {
            "kind": "record-level",
            "noise_multiplier": 4.0,
            "target_delta": 1e-5,
            "max_epsilon": 9.0,
            "max_grad_norm": 1.0,
            "sample_rate": 0.01,
            "expected_batch_size": 4.0,
        },
    },
    source="test",
)


@pytest.mark.parametrize("mib", [12, 4000])
def test_what_memory_a_run_that_hides_rows_needs_does_not_tell_how_long_one_is(mib: int, rows: Path) -> None:
    """A server could set its run's sizes so that the code 'memory' comes if the longest row is there."""
    task = device_task(HIDING)
    content = content_bytes(task_content(Task(task.digest, 0, b"", device_task=task.text)))
    header = {"run_digest": task.digest, "device_task": task.text, "max_memory_mib": mib}

    def error() -> Any:
        answered = execute_order(Frame(order(rows, **header).header, {"content": content, "memory": b""}))
        drop_loaded_run(task.digest)
        return answered.header["error"]

    without = error()
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "word " * 500, "answer": "x " * 90}) + "\n")
    assert error() == without
    assert (without is None) == (mib == 4000)


@pytest.mark.slow
def test_a_worker_that_begins_anew_takes_the_steps_from_where_the_last_one_stood(
    rows: Path, tmp_path: Path
) -> None:
    """Two confined processes; the second is sent the step alone, which leads on from the first's state."""
    place = WorkerPlace(tmp_path, rows)
    tables = RUN.model_dump(mode="json") | {
        "space": {"kind": "seed-scalars", "num_seeds": 8},
        "training": {"kind": "zeroth-order", "rule": "zo-sgd", "steps": 1, "batch_size": 2, "lr": 1e-6},
    }
    run = build_run(tables, source="test")
    resident, told = load_serving_run(run), device_task(run)
    digest, space = told.digest, resident.space
    first, steps = space.initial_state(resident.parameters), steps_of(run, digest, space)
    assert steps is not None
    _, change = space.example(first, 8, np.random.default_rng(0))
    step = steps.make(1, first, {name: array.astype(np.float64) for name, array in change.items()}, {})
    assert arrays_digest(step.state) != arrays_digest(first)
    whole = encode(Envelope(first, digest, 1, arrays_digest(first), space.kind))
    sent = {
        1: StateMessage(arrays_digest(first), whole, keep=True),
        2: StateMessage(arrays_digest(step.state), steps=(step.payload,), keep=True),
    }

    def train(number: int) -> Frame:
        asked = Task(digest, number, encode_state(sent[number]), device_task=told.text)
        content = content_bytes(task_content(asked))
        header = order(rows, run_digest=digest, device_task=told.text, kind=TRAIN, group=str(number)).header
        return Frame({**header, "replicas": str(tmp_path / "replicas")}, {"content": content, "memory": b""})

    async def live() -> list[Frame]:
        workshop, answers = WorkerProcess(Bounds(), place=place), []
        for number in sent:
            answers.append(await workshop.do(train(number)))
            await workshop.release()
        return answers

    assert [answer.header["error"] for answer in asyncio.run(live())] == [None, None]
    kept = ReplicaShelf(tmp_path / "replicas").get(digest)
    assert {name: array.tobytes() for name, array in kept.items()} == {
        name: array.tobytes() for name, array in step.state.items()
    }


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ({}, ["examples", "loss", "steps"]),
        ({"metrics": ["loss"]}, ["loss"]),
        ({"metrics": []}, []),
        ({"min_count": 9}, ["loss"]),
        ({"min_count": 8}, ["examples", "loss", "steps"]),
    ],
)
def test_numbers_that_the_owner_does_not_tell_are_not_in_an_update(
    rows: Path, told: dict[str, Any], names: list[str]
) -> None:
    """Eight rows are trained on; the weight of this run is uniform."""
    tables = RUN.model_dump(mode="json") | {"federation": {"weighting": "uniform"}}
    tables["data"]["heldout"] = 0.0
    run = build_run(tables, source="test")
    resident, task = load_serving_run(run), device_task(run)
    digest, first = task.digest, resident.space.initial_state(resident.parameters)
    state = encode(Envelope(first, digest, 1, arrays_digest(first), resident.space.kind))
    header = order(rows, run_digest=digest, device_task=task.text, kind=TRAIN, group="1", **told).header
    content = content_bytes(task_content(Task(digest, 1, state, device_task=task.text)))
    answered = execute_order(Frame(header, {"content": content, "memory": b""}))
    drop_loaded_run(digest)
    assert answered.header["error"] is None
    left = contents(answered.parts["content"])
    assert sorted(left["metrics"]) == names
    assert left["weight"] == 1


def test_replicas_that_are_torn_or_too_many_are_none(tmp_path: Path) -> None:
    shelf, names = ReplicaShelf(tmp_path / "replicas"), [f"{number:064x}" for number in range(10)]
    assert shelf.get("ab" * 32) == {}
    for number, name in enumerate(names):
        shelf.put(name, {"a": np.full(3, number)})
        os.utime(tmp_path / "replicas" / f"{name}.state", (number, number))
    assert [bool(shelf.get(name)) for name in names] == [False] * 2 + [True] * 8
    assert shelf.get(names[9])["a"].tolist() == [9, 9, 9]
    (tmp_path / "replicas" / f"{names[9]}.state").write_bytes(b"torn")
    assert shelf.get(names[9]) == {}


@pytest.mark.parametrize("name", ["", "ab", "../../keys/agent", "A" * 64, "0" * 63 + "/"])
def test_a_name_that_is_no_digest_makes_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is no digest of a run"):
        ReplicaShelf(tmp_path / "replicas").put(name, {"a": np.zeros(1)})
    with pytest.raises(StateError, match="is no digest of a run"):
        StartShelf(tmp_path / "starts").put(name, b"x")
    assert list(tmp_path.iterdir()) == []
