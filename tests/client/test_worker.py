"""What the worker does with an order of the real client app: loads this device's rows, checks the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.flower.content import content_bytes, content_of
from fedpeft.flower.tasks import HELLO, Task, task_content
from fedpeft.resident import drop_resident
from fedpeft.runfile import build_run, run_digest, run_json
from fedpeft_client.frames import Frame
from fedpeft_client.worker import done
from fedpeft_client.workshop import CLIENT_APP

RUN = build_run(
    {
        "run": {"name": "t", "rounds": 1},
        "peft": {"method": "lora", "r": 2},
        "data": {"train": "nowhere", "prompt": "{prompt}", "answer": "{answer}", "heldout": 0.25},
    },
    source="test",
)


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "site-a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} ", "answer": str(n)}) + "\n" for n in range(8)))
    yield path
    drop_resident(run_digest(RUN))


def order(rows: Path, **header: Any) -> Frame:
    digest = run_digest(RUN)
    standard = {
        "app": CLIENT_APP,
        "kind": HELLO,
        "group": "0",
        "run_digest": digest,
        "run": run_json(RUN),
        "client": "site-a",
        "data": str(rows),
        "model": "",
        "base_digests": [],
    }
    content = content_bytes(task_content(Task(digest, 0, b"", run_json(RUN))))
    return Frame(standard | header, {"content": content, "memory": b""})


def test_it_trains_on_its_own_rows_under_its_own_name(rows: Path) -> None:
    answered = done(order(rows))
    assert answered.header["error"] == ""
    hello = content_of(answered.parts["content"], who="worker").config_records["hello"]
    assert hello["client"] == "site-a"
    assert hello["examples"] == 6  # a quarter of eight rows is held out
    assert hello["base-digest"] == answered.header["base_digest"]
    pinned = done(order(rows, base_digests=[answered.header["base_digest"]]))
    assert pinned.header["error"] == ""
    other = done(order(rows, base_digests=["ab" * 32]))
    assert other.header["refused"]
    assert "which policy.base_digests does not name" in other.header["error"]


def test_another_run_file_than_announced(rows: Path) -> None:
    changed = run_json(RUN).replace('"rounds":1', '"rounds":9')
    answered = done(order(rows, run=changed))
    assert answered.header["error"].startswith("ModelError: the run file that came is not that of run")


def test_rows_that_cannot_be_read(rows: Path) -> None:
    rows.write_text('{"question": "1"}\n')
    answered = done(order(rows))
    assert answered.header["error"].startswith("DataError: ")
    assert not answered.header["refused"]
