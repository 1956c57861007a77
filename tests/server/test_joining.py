"""Agents that come after the roll call: drawn from a round on that the ledger names, or told why not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FederationError
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import drop_loaded_run, set_loaded_run
from fedpeft.runtime.randomness import stream
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.transport.roster import Member, Roster
from fedpeft.transport.tasks import Hello, Task, hello_reply
from fedpeft_client.commands.client_command import client_status_command
from fedpeft_server.ops.daemon import standing
from fedpeft_server.ops.server_settings import read_settings
from fedpeft_server.runs.joining import Joining
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from tests.server.fleet import RUN, fleet, server, wait_for

BASE = "ba5e" * 16
AT_ROLL_CALL = [f"client-{number}" for number in range(3)]
LATE = "client-3"


def idle_run() -> RunConfig:
    """Four clients that compute nothing, two in a round, for as long as it takes."""
    tables: dict[str, Any] = {
        "run": {"name": "idle", "rounds": 50_000},
        "peft": {"method": "lora", "r": 2},
        "data": {"limit": 32, "max_length": 64, "partitioner": {"kind": "iid", "clients": 4}},
        "training": {"kind": "none"},
        "evaluation": {"every": 1_000_000, "bootstrap": 1},
        "federation": {"sampling": {"kind": "fixed", "cohort": 2}},
        "output": {"keep_checkpoints": 2},
    }
    return build_run(tables, source="test")


@pytest.mark.slow
def test_an_agent_that_comes_later_is_drawn_from_the_next_rounds(tmp_path: Path) -> None:
    run = idle_run()
    set_loaded_run(load_simulated_run(run))  # for the agents, which are in this process
    settings = read_settings(None, {"listen": "127.0.0.1:0", "state": tmp_path / "state", "insecure": True})
    with standing(settings) as (store, supervisor, running):
        supervisor.start()

        def agents(names: list[str]) -> Any:
            return fleet(running.address, names, tmp_path / "homes", app="fedpeft.flower.in_process_app:app")

        with agents(AT_ROLL_CALL):
            stored = supervisor.submit(run, Rules(min_agents=3), submission="one", submitter="me")
            wait_for(lambda: supervisor.get(stored.id).round >= 1, 60.0)
            with agents([LATE]):
                wait_for(lambda: counted(store, LATE), 60.0)
            # It has left again: it is a member that does not answer, and no stranger when it returns.
            assert supervisor.stop(stored.id, "enough").status == RunStatus.STOPPED
        roster = store.runs.roster(stored.id)
        assert roster is not None
        (since,) = {roster.members[LATE].since}
        assert since > 1
        assert {roster.members[name].since for name in AT_ROLL_CALL} == {0}
        rows = rounds_of(store, stored)
        assert [row["round"] for row in rows if row["joined"]] == [since]
        assert rows[since]["joined"] == [LATE]
        check_draws(store, stored, since)
    drop_loaded_run(run_digest(run))


def rounds_of(store: Store, stored: StoredRun) -> list[dict[str, Any]]:
    lines = store.runs.lines(stored.id, limit=100_000)
    return [row for line in lines if (row := json.loads(line.text))["event"] == "round"]


def counted(store: Store, name: str) -> bool:
    with store.database.reading() as connection:
        found = connection.exec_driver_sql(f"SELECT 1 FROM updates WHERE agent = '{name}' AND counted")
        return found.first() is not None


def check_draws(store: Store, stored: StoredRun, since: int) -> None:
    """Each round's cohort follows from the seed and from those who were there, before and after."""
    with store.database.reading() as connection:
        found = connection.exec_driver_sql("SELECT number, cohort FROM rounds WHERE number > 0").fetchall()
    assert len(found) >= since
    for number, cohort in found:
        names = [*AT_ROLL_CALL, LATE][: 4 if number >= since else 3]
        chosen = stream(0, "cohort", number).choice(len(names), size=2, replace=False)
        assert json.loads(cohort)["asked"] == sorted(names[index] for index in chosen)


# ---- One decision at a time


class Door(PolledGrid):
    """Strangers who answer when they are let."""

    def __init__(self, holds: Mapping[str, str]) -> None:
        ensure_identity()
        self.holds, self.nodes = holds, {name: place + 1 for place, name in enumerate(sorted(holds))}
        self.present = set(holds)
        self.silent = False
        self.pushed: list[Message] = []
        self.told: list[tuple[str, str]] = []

    @property
    def greeter(self) -> Grid:
        return self

    def here(self) -> Mapping[str, int]:
        return {name: self.nodes[name] for name in self.present}

    def know(self, agents: Iterable[str]) -> None: ...

    def tell(self, agent: str, text: str) -> None:
        self.told.append((agent, text))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        first = len(self.pushed)
        self.pushed += messages
        return [str(number) for number in range(first, len(self.pushed))]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        names = {node: name for name, node in self.nodes.items()}
        for message in () if self.silent else [self.pushed[int(id_)] for id_ in message_ids]:
            name = names[message.metadata.dst_node_id]
            yield hello_reply(Hello(name, 7, self.holds[name]), message)

    def get_node_ids(self) -> Iterable[int]:
        return []


@dataclass
class Scene:
    """A run with one member, ann, and who stands at its door."""

    door: Door
    joining: Joining
    said: list[str] = field(default_factory=list)
    kept: list[Roster] = field(default_factory=list)


def scene(holds: Mapping[str, str], *, open_: int = 0, **tables: Any) -> Scene:
    def check(roster: Roster) -> None:
        if "liar" in roster.members:
            raise FederationError("it is a liar")

    def keep(roster: Roster) -> Roster:
        made.kept.append(roster)
        return roster

    door = Door({"ann": BASE, **holds})
    run = build_run({"run": {"name": "t", "rounds": 9}, **tables}, source="test")
    said: list[str] = []
    joining = Joining(
        run, door, check=check, keep=keep, say=said.append, is_open=lambda number: number == open_
    )
    joining.begin(Task("d", 0, b""), Roster({"ann": Member(1, 5)}, BASE))
    made = Scene(door, joining, said)
    return made


def test_nobody_is_waited_for_and_everyone_is_greeted_once() -> None:
    at = scene({"bob": BASE})
    at.door.silent = True
    for number in (2, 3):
        assert at.joining.before(number).names == ["ann"]
    assert len(at.door.pushed) == 1
    at.door.silent = False
    roster = at.joining.before(4)
    assert roster.members["bob"] == Member(at.door.nodes["bob"], 7, since=4)
    assert (roster.in_round(3), roster.in_round(4), roster.names_joining(4)) == (
        ["ann"],
        ["ann", "bob"],
        ("bob",),
    )
    assert at.joining.before(5) == roster
    assert (at.kept, at.said, at.door.told, len(at.door.pushed)) == ([roster], [], [], 1)


def test_a_round_that_is_drawn_is_not_joined() -> None:
    """As after a restart in it."""
    at = scene({"bob": BASE}, open_=3)
    roster = at.joining.before(3)
    assert (roster.members["bob"].since, roster.names_joining(3), roster.names_joining(4)) == (
        4,
        (),
        ("bob",),
    )


def test_who_cannot_join_is_told_once_and_again_when_it_returns() -> None:
    at = scene({"eve": "0dd" + BASE[3:], "liar": BASE})
    for number in (2, 3):
        assert at.joining.before(number).names == ["ann"]
    assert sorted(at.said)[0].startswith("eve does not join the run: it holds base model 0ddeba5eba5e and")
    assert sorted(at.said)[1] == "liar does not join the run: it is a liar"
    assert sorted(name for name, _ in at.door.told) == ["eve", "liar"]
    at.door.present.discard("eve")
    at.joining.before(4)
    at.door.present.add("eve")
    at.joining.before(5)
    assert [name for name, _ in at.door.told].count("eve") == 2


def test_a_run_that_promises_privacy_for_a_fixed_set_of_clients_takes_nobody_in() -> None:
    privacy = {
        "kind": "client-level",
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "target_delta": 1e-3,
        "max_epsilon": 100.0,
    }
    at = scene({"bob": BASE}, privacy=privacy)
    for number in (2, 3):
        assert at.joining.before(number).names == ["ann"]
    ((name, text),) = at.door.told
    assert name == "bob"
    assert "not asked in this run: it came after the roll call, and its privacy is that of a cohort" in text
    assert at.said == [text.replace("it is not asked in this run", "bob does not join the run", 1)]
    assert at.door.pushed == []


def test_a_roster_only_grows(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        run = build_run({"run": {"name": "t", "rounds": 9}}, source="test")
        stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
        ann = Roster({"ann": Member(1, 5)}, BASE)
        larger = replace(ann, members={**ann.members, "bob": Member(2, 7, since=4)})
        assert store.runs.keep_roster(stored.id, ann) == ann
        assert store.runs.keep_roster(stored.id, larger) == larger
        assert store.runs.keep_roster(stored.id, ann) == larger
        assert store.runs.roster(stored.id) == larger


def test_what_the_server_says_is_in_the_agents_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server() as running, fleet(running.address, ["site-a"], tmp_path):
        grid = running.grid(RUN)
        wait_for(lambda: grid.agents_here)
        grid.tell("site-a", "it is not asked in this run:\nit came late")
        grid.tell("nobody", "is here")

        def shown() -> str:
            client_status_command(tmp_path / "site-a", "", as_json=False)
            return capsys.readouterr().out

        wait_for(lambda: "run-1: it is not asked in this run: it came late" in shown())
