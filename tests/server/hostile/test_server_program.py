"""A hostile server's whole list of ways to an agent's code and files, against one with a strict policy."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import run_digest, run_json
from fedpeft.participant.loaded_run import drop_loaded_run
from fedpeft.transport.tasks import HELLO, TRAIN, Task, read_hello
from fedpeft_client.policy.owner_policy import Policy
from tests.server.fleet import reason
from tests.server.hostile.support import SITE, HostileServer, opened, rows, run_of

__all__ = ["rows"]

SECRET = "a-secret-of-the-owner"
STRICT = Policy(
    methods=("lora",),
    spaces=("adapter-delta",),
    training=("first-order",),
    models=(),
    privacy=("local",),
    max_local_steps=10,
)


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


@pytest.fixture
def agent(rows: Path, tmp_path: Path) -> Iterator[HostileServer]:
    with opened(rows, tmp_path, STRICT, processes=True) as made:
        yield made


def told(**parts: Any) -> str:
    """What an honest server tells of the run, with these parts in place of its own."""
    return json.dumps({**json.loads(device_task(run_of()).text), **parts})


def tellings(place: Path) -> dict[str, str]:
    """What no agent may take, each under its own true digest."""
    secret, evil = str(place / "secret.jsonl"), str(place / "model")
    honest = json.loads(told())
    lora = {"method": "lora", "r": 2}
    return {
        "rows of another file": told(data={**honest["data"], "train": secret}),
        "rows of a loader": told(data={**honest["data"], "train": "datasets:pandas"}),
        "a test set": told(data={**honest["data"], "test": secret}),
        "a model by its path": told(model={"path": evil}),
        "a model by a path for a name": told(model={"name": evil}),
        "a model above": told(model={"name": "../model"}),
        "a package": told(model={"name": "package:os/x"}),
        "a model of the hub": told(model={"name": "owner/model"}),
        "a group's model": told(groups=[{"clients": [SITE], "model": {"path": evil}}]),
        "the full model": told(evaluation={"plug_into": evil}),
        "a module to import": told(peft={**lora, "megatron_core": "antigravity", "megatron_config": {}}),
        "an expression": told(peft={**lora, "target_modules": "(x+x+)+y"}),
        "an expression in a table": told(peft={**lora, "rank_pattern": {"(x+x+)+y": 4}}),
        "a path in a stage": told(stages=[{"kind": "top-k", "density": 0.5, "file": secret}]),
        "a stage that there is not": told(stages=[{"kind": "exec"}]),
        "a template that reaches": told(data={**honest["data"], "prompt": "{prompt.__class__}"}),
        "noise that is known": told(privacy={**honest["privacy"], "seeded": True}),
        "attackers": told(federation={"attack": {"kind": "alie", "fraction": 0.5}}),
        "depth": "[" * 50_000,
        "size": json.dumps({**honest, "x": "y" * (1 << 20)}),
        "no text": "\x00",
    }


@pytest.mark.slow
def test_a_hostile_server_ends_with_nothing(agent: HostileServer, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(json.dumps({"prompt": SECRET, "answer": SECRET}) + "\n")
    (tmp_path / "model").mkdir()
    honest, other = run_of(), run_of(data={"train": str(tmp_path / "secret.jsonl"), "prompt": "{prompt}",
                                           "answer": "{answer}"})  # fmt: skip
    task = device_task(honest)
    replies = {what: agent.tell(text, HELLO) for what, text in tellings(tmp_path).items()}
    replies |= {
        "another run's content": agent.send(
            Task(run_digest(other), 0, b"", run_json(other)), HELLO, digest=task.digest
        ),
        "a run file alone": agent.send(Task(run_digest(other), 0, b"", run_json(other)), HELLO),
        "other text than the digest's": agent.send(
            Task(task.digest, 0, b"", device_task=told(run={"name": "x", "rounds": 1})), HELLO
        ),
        "another round's content": agent.send(
            Task(task.digest, 1, b"", device_task=task.text), TRAIN, round=2
        ),
        "a pull that is no number": agent.send(
            Task(task.digest, 1, b"", device_task=task.text, proximal_mu=float("nan")), TRAIN
        ),
        "another kind": agent.send(Task(task.digest, 0, b"", device_task=task.text), "query.rows"),
        "another run's name": agent.send(
            Task("../../etc", 0, b"", device_task=task.text), HELLO, digest="00" * 32, run="../../x"
        ),
    }
    taken = [what for what, reply in replies.items() if not reply.has_error()]
    assert taken == []
    assert not [what for what, reply in replies.items() if SECRET in reason(reply)]
    assert not [what for what, reply in replies.items() if str(tmp_path) in reason(reply)]
    start = pickle.dumps(Evil(tmp_path / "ran"))
    reply = agent.send(Task(task.digest, 0, b"", device_task=task.text, start=start), HELLO)
    assert read_hello(reply).client == SITE, "and an honest roll call is answered, without a look at a start"
    drop_loaded_run(task.digest)
    assert not (tmp_path / "ran").exists()
    assert list((agent.home / "starts").glob("*")) == []
    assert agent.ledger() == [], "nothing was trained"
    assert not list(tmp_path.rglob("x.state"))
