"""Starts that came with the roll call: on disk by run, and used by a worker that begins anew."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run
from fedpeft.models.starts import decomposition_bytes, decomposition_of
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.loaded_run import drop_loaded_run
from fedpeft.runtime.frames import Frame
from fedpeft.transport.record_bytes import content_bytes
from fedpeft.transport.tasks import HELLO, TRAIN, Task, task_content
from fedpeft_client.workers.start_cache import StartShelf
from fedpeft_client.workers.worker import execute_order
from fedpeft_client.workers.worker_process import CLIENT_APP

RUN = build_run(
    {
        "run": {"name": "t", "rounds": 1},
        "model": {"quantization": "rtn4"},
        "peft": {"method": "lora", "r": 2, "init_lora_weights": "lq-lora", "loftq_config": {"loftq_iter": 1}},
        "data": {"train": "nowhere", "prompt": "{prompt}", "answer": "{answer}"},
    },
    source="test",
)
TASK = device_task(RUN)
DIGEST = TASK.digest


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "site-a.jsonl").write_text('{"prompt": "1 ", "answer": "1"}\n' * 4)
    yield tmp_path
    drop_loaded_run(DIGEST)


def order(site: Path, kind: str) -> dict[str, Any]:
    return {
        "app": CLIENT_APP,
        "kind": kind,
        "group": "0",
        "run_digest": DIGEST,
        "device_task": TASK.text,
        "client": "site-a",
        "data": str(site / "site-a.jsonl"),
        "model": "",
        "base_digests": [],
        "starts": str(site / "starts"),
    }


def base_held(site: Path, kind: str, start: bytes = b"") -> str:
    """Fingerprint of the base that a worker, which holds nothing, loads for an order."""
    drop_loaded_run(DIGEST)
    header = order(site, kind)
    content = content_bytes(task_content(Task(DIGEST, 0, b"", device_task=TASK.text, start=start)))
    return str(
        execute_order(Frame(header, {"content": content, "memory": b""})).header.get("base_digest", "")
    )


def test_a_start_that_came_once_serves_every_later_worker(site: Path) -> None:
    server = load_serving_run(RUN)
    theirs = decomposition_of(server.start_bytes)
    name, one = next(iter(theirs.items()))
    assert one.removed is not None
    # Nothing that this machine would compute by itself, to see whose start it is.
    up, down = one.removed
    other = decomposition_bytes({**theirs, name: one.__class__(one.up, one.down, (2 * up, down))})
    assert base_held(site, HELLO, server.start_bytes) == server.base_digest
    changed = base_held(site, HELLO, other)
    assert changed not in ("", server.base_digest)
    assert base_held(site, TRAIN) == changed, "read from the disk"
    (kept,) = (site / "starts").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert base_held(site, TRAIN) == server.base_digest, "spoilt, so computed here"


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


def test_what_is_no_start_is_not_written(site: Path) -> None:
    server = load_serving_run(RUN)
    names = list(decomposition_of(server.start_bytes))
    foreign = decomposition_bytes({name.replace("layers", "x"): one for name, one in
                                   decomposition_of(server.start_bytes).items()})  # fmt: skip
    assert names
    for start in (pickle.dumps(Evil(site / "ran")), b"x", server.start_bytes[:-3], foreign):
        assert base_held(site, HELLO, start) == ""
    assert not (site / "starts").exists()
    assert not (site / "ran").exists()


def test_a_run_that_starts_by_its_seed_has_no_use_for_a_start(site: Path) -> None:
    tables = RUN.model_dump(exclude={"peft"}) | {"peft": {"method": "lora", "r": 2}, "model": {}}
    plain = device_task(build_run(tables, source="test"))
    asked = Task(plain.digest, 0, b"", device_task=plain.text, start=b"anything")
    header = order(site, HELLO) | {"run_digest": plain.digest, "device_task": plain.text}
    answer = execute_order(Frame(header, {"content": content_bytes(task_content(asked)), "memory": b""}))
    drop_loaded_run(plain.digest)
    assert answer.header["error"] is None
    assert not (site / "starts").exists()


def test_a_shelf_keeps_the_newest_runs_and_no_changed_file(tmp_path: Path) -> None:
    shelf = StartShelf(tmp_path / "starts")
    assert shelf.get("a" * 64) == b""
    for number in range(12):
        shelf.put(f"{number:064x}", bytes([number]) * 5)
    assert [shelf.get(f"{number:064x}") != b"" for number in range(12)] == [False] * 4 + [True] * 8
    shelf.put(f"{11:064x}", b"newer")
    assert shelf.get(f"{11:064x}") == b"newer"
    assert len(list((tmp_path / "starts").iterdir())) == 8
    next((tmp_path / "starts").glob(f"{11:064x}-*")).write_bytes(b"older")
    assert shelf.get(f"{11:064x}") == b""
