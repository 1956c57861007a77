"""`flwr run` on Flower's own SuperLink and SuperNodes: real processes on loopback, each in its own folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict

from fedpeft.errors import FederationError, UsageError
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.server_app import NodeGrid, read_order
from fedpeft.transport.message_exchange import exchange
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.workers import InlineWorkers
from simulations.deployment import Superlink, program, superlink
from tests.simulation.runs import strip

CLIENTS, ROUNDS = 2, 2
RUN = f"""
[run]
name = "tiny"
rounds = {ROUNDS}
[peft]
method = "lora"
r = 2
lora_dropout = 0.1
[data]
train = "rows/train.jsonl"
prompt = "{{question}}="
answer = "{{answer}}"
max_length = 64
partitioner = {{ kind = "iid", clients = {CLIENTS} }}
[training]
steps = 2
batch_size = 8
lr = 7e-3
[evaluation]
bootstrap = 20
metrics = ["exact-match"]
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Superlink]:
    with superlink(tmp_path_factory.mktemp("flower"), CLIENTS) as made:
        yield made


@pytest.fixture(scope="module")
def run_file(deployment: Superlink) -> Path:
    """A run file whose rows lie beside it, by a relative path: every process has to find them."""
    folder = deployment.folder / "input"
    (folder / "rows").mkdir(parents=True)
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(60)]
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    return folder / "run.toml"


@pytest.fixture(scope="module")
def simulated(deployment: Superlink, run_file: Path) -> Path:
    """The folder that `fedpeft simulate` makes of the run file."""
    out = deployment.folder / "simulated"
    words = [program("fedpeft"), "simulate", str(run_file), "--out", str(out), "--quiet", "--workers", "2"]
    done = subprocess.run(
        words, env=deployment.environment, cwd=deployment.folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def flown(deployment: Superlink, run_file: Path) -> Path:
    """The folder that `flwr run` makes of it."""
    out = deployment.folder / "flown"
    result = deployment.run(run_file, out)
    assert result.status == "finished:completed", result.log
    return out


def adapter(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_on_supernodes_gives_the_bytes_of_a_simulation(flown: Path, simulated: Path) -> None:
    assert adapter(flown) == adapter(simulated)
    assert [strip(row) for row in rows(flown)] == [strip(row) for row in rows(simulated)]
    assert {path.name for path in flown.iterdir()} == {path.name for path in simulated.iterdir()}
    assert rows(flown)[0]["engine"] == "flower"
    for folder in (flown, simulated):
        seconds = [row["wall_s"] for row in rows(folder) if row["event"] == "round" and row["round"]]
        print(f"seconds per round, {folder.name}: {seconds}")  # pytest -rP shows it


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_unfinished_run_goes_on(deployment: Superlink, run_file: Path, flown: Path) -> None:
    """What is left of a run that was killed in its last round: everything that follows is made anew."""
    out = deployment.folder / "interrupted"
    shutil.copytree(flown, out)
    shutil.rmtree(out / "adapter")
    (out / "report.html").unlink()
    (out / "checkpoints" / f"round-{ROUNDS:06d}.safetensors").unlink()
    before = (out / "checkpoints" / "round-000001.safetensors").stat().st_mtime_ns
    result = deployment.run(run_file, out)
    assert result.status == "finished:completed", result.log
    assert (out / "checkpoints" / "round-000001.safetensors").stat().st_mtime_ns == before
    assert adapter(out) == adapter(flown)
    assert [strip(row) for row in rows(out)] == [strip(row) for row in rows(flown)]


@pytest.mark.slow
def test_another_run_in_the_folder_fails_with_one_line(
    deployment: Superlink, run_file: Path, flown: Path
) -> None:
    other = run_file.with_name("other.toml")
    other.write_text(RUN.replace("lr = 7e-3", "lr = 1e-3"))
    content = (flown / "metrics.jsonl").read_bytes()
    result = deployment.run(other, flown)
    assert result.status == "finished:failed"
    assert f"{flown} holds run" in result.details
    assert "Traceback" not in result.log
    assert len([line for line in result.log.splitlines() if "RunExistsError" in line]) == 1
    assert (flown / "metrics.jsonl").read_bytes() == content


class Link(LocalGrid):
    """Answers as a SuperLink does for nodes that are gone: in its own name (1), by the message's id.

    A message to a node of `left` is not taken at all: its id is None.
    """

    def __init__(self, gone: int, left: int, taken: int) -> None:
        super().__init__(0, InlineWorkers())
        self._gone, self._left, self._taken = gone, left, taken
        self._messages: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[Any]:
        ids = [
            None if message.metadata.dst_node_id == self._left else f"m{message.metadata.dst_node_id}"
            for message in messages
        ]
        self._messages = {id_: message for id_, message in zip(ids, messages, strict=True) if id_}
        return ids[: self._taken]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._answer(id_) for id_ in message_ids]

    def _answer(self, id_: str) -> Message:
        message = self._messages[id_]
        if message.metadata.dst_node_id != self._gone:
            reply = Message(RecordDict(), reply_to=message)
        else:
            reply = Message(Error(code=3, reason="node unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # Flower sets these so itself: there is no setter
        reply.metadata.__dict__["_reply_to_message_id"] = id_
        return reply


def messages(nodes: Sequence[int]) -> list[Message]:
    ensure_identity()
    return [Message(RecordDict(), node, "train", group_id="1") for node in nodes]


def test_a_node_that_is_gone_answers_with_an_error() -> None:
    grid = NodeGrid(Link(gone=8, left=9, taken=3))
    replies = {
        reply.metadata.src_node_id: reply for reply in exchange(grid, messages([7, 8, 9]), timeout_s=20)
    }
    assert {node: reply.has_error() for node, reply in replies.items()} == {7: False, 8: True, 9: True}
    assert replies[8].error.reason == "node unavailable"


def test_messages_that_the_superlink_drops_stop_the_run() -> None:
    grid = NodeGrid(Link(gone=0, left=0, taken=1))
    with pytest.raises(FederationError, match="took 1 of 2 messages"):
        grid.push_messages(messages([7, 8]))


def test_an_app_without_a_run_file_is_refused() -> None:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(UsageError, match=r"fedpeft\.run-file is empty"):
        read_order(Link(0, 0, 0), context)
