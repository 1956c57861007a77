"""What programs of hostile parties share: a server that sends what it likes, and an agent that it meets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.participant.load_server import load_serving_run
from fedpeft.transport.tasks import Task, task_content
from fedpeft.updates.update import Arrays, arrays_digest, freeze_arrays
from fedpeft.wire.codec import Envelope, encode
from fedpeft_client.policy.device_accountant import LEDGER_FILE
from fedpeft_client.policy.owner_policy import Policy
from fedpeft_server.transport.grpc_grid import GrpcGrid, RunIdentity, node_id
from fedpeft_server.transport.serving import RunningServer
from tests.server.fleet import agents_with_rows, collected, server, wait_for

SITE = "site-a"
TABLES: dict[str, Any] = {
    "run": {"name": "study", "rounds": 1},
    "peft": {"method": "lora", "r": 2},
    "data": {"train": "nowhere", "prompt": "{prompt}", "answer": "{answer}"},
    "training": {"steps": 1, "batch_size": 2},
    "federation": {"weighting": "uniform"},
}
PRIVACY = {
    "kind": "local",
    "noise_multiplier": 8.0,
    "target_delta": 1e-4,
    "max_epsilon": 9.0,
    "clip_norm": 1.0,
}


def run_of(**tables: Any) -> RunConfig:
    return build_run(TABLES | {"privacy": PRIVACY} | tables, source="test")


@dataclass
class HostileServer:
    """A server that sends whatever it likes for the runs that it holds."""

    running: RunningServer
    home: Path
    grids: dict[tuple[str, str], GrpcGrid] = field(default_factory=dict)

    def state(self, run: RunConfig, shift: float = 0.0) -> bytes:
        """The run's first state, or another one, as it would be sent."""
        resident = load_serving_run(run)
        start: Arrays = resident.initial_state()
        moved = freeze_arrays({name: (array + shift).astype(array.dtype) for name, array in start.items()})
        kind = resident.space.kind
        return encode(Envelope(moved, device_task(run).digest, 0, arrays_digest(moved), kind))

    def ask(
        self, run: RunConfig, kind: str, round_: int, state: bytes = b"", **changes: Any
    ) -> list[Message]:
        """The replies to one task; `changes` are to what is said of it.

        Args:
            named: the server's name for the run.
            stated_round: what the content says.
            count: how often it is asked, at once.
        """
        told = device_task(run)
        digest = told.digest
        name = changes.get("named", "study-1")
        grid = self._grid(name, digest)
        asked = []
        for number in range(changes.get("count", 1)):
            moved = state if not number else self.state(run, number / 8)
            content = task_content(
                Task(digest, changes.get("stated_round", round_), moved, device_task=told.text)
            )
            asked.append(Message(content, node_id(SITE), kind, group_id=str(round_)))
        return collected(grid, list(grid.push_messages(asked)), 60.0)

    def send(self, task: Task, kind: str, **said: Any) -> Message:
        """The reply to a task of any content; `said` is what is said of it beside: digest, round, run."""
        digest = said.get("digest", task.run_digest)
        grid = self._grid(said.get("run", "study-1"), digest)
        message = Message(
            task_content(task), node_id(SITE), kind, group_id=str(said.get("round", task.round))
        )
        (reply,) = collected(grid, list(grid.push_messages([message])), 60.0)
        return reply

    def tell(self, text: str, kind: str, **parts: Any) -> Message:
        """The reply to a task that tells this of its run, under the digest of just that text."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.send(Task(digest, parts.pop("round", 0), b"", device_task=text, **parts), kind)

    def _grid(self, name: str, digest: str) -> GrpcGrid:
        if (name, digest) not in self.grids:
            self.grids[name, digest] = self.running.grid(RunIdentity(name, digest), max_result_bytes=1 << 24)
        grid = self.grids[name, digest]
        grid.know([SITE])
        return grid

    def ledger(self) -> list[dict[str, Any]]:
        """The lines of the agent's ledger."""
        path = self.home / "privacy" / LEDGER_FILE
        return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / f"{SITE}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} ", "answer": str(n)}) + "\n" for n in range(8)))
    return path


@pytest.fixture
def hostile(rows: Path, tmp_path: Path) -> Iterator[HostileServer]:
    with opened(rows, tmp_path) as made:
        yield made


@contextmanager
def opened(
    rows: Path, folder: Path, policy: Policy | None = None, *, processes: bool = False
) -> Iterator[HostileServer]:
    """An agent with these rows, and a server that it trusts with nothing."""
    with (
        server(max_inline_bytes=1 << 20) as running,
        agents_with_rows(running.address, {SITE: rows}, folder / "homes", policy=policy, processes=processes),
    ):
        wait_for(lambda: running.grid(RunIdentity("none", "00" * 32)).agents_here == [SITE])
        yield HostileServer(running, folder / "homes" / SITE)
