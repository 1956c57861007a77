"""A server that asks an agent for more than its private runs promise: what leaves is one answer a round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fedpeft.config.device_task import device_task
from fedpeft.participant.loaded_run import drop_loaded_run
from fedpeft.transport.tasks import HELLO, TRAIN, read_hello, read_update
from fedpeft_client.policy.owner_policy import Policy
from fedpeft_client.status import read_status
from tests.server.fleet import reason
from tests.server.hostile.support import PRIVACY, SITE, HostileServer, hostile, opened, rows, run_of

__all__ = ["hostile", "rows"]


@pytest.fixture(autouse=True)
def dropped() -> Iterator[None]:
    yield
    drop_loaded_run(device_task(run_of()).digest)


@pytest.mark.slow
def test_forty_trainings_for_one_round_are_answered_by_one_update(hostile: HostileServer) -> None:
    run = run_of()
    (hello,) = hostile.ask(run, HELLO, 0)
    assert read_hello(hello).client == SITE
    replies = hostile.ask(run, TRAIN, 1, hostile.state(run), count=40)
    updates = {read_update(reply) for reply in replies if not reply.has_error()}
    assert len(updates) == 1, "two draws of noise over one round were released"
    charges = [line for line in hostile.ledger() if "charge" in line]
    assert [line["round"] for line in charges] == [1]
    shown = read_status(hostile.home)
    (listed,) = shown["runs"]
    assert (listed["paid_round"], listed["answered_round"], listed["kind"]) == (1, 1, "local")
    assert shown["epsilon"] == pytest.approx(charges[0]["epsilon"])


@pytest.mark.slow
def test_rounds_that_the_run_does_not_have_are_refused(hostile: HostileServer) -> None:
    run = run_of()
    state = hostile.state(run)
    for kind, round_, changes in (
        (TRAIN, 2, {}),
        (TRAIN, 0, {}),
        (TRAIN, 1, {"stated_round": 7}),
        (HELLO, 1, {}),
        ("query.rows", 0, {}),
        ("evaluate", 1, {}),
    ):
        (reply,) = hostile.ask(run, kind, round_, state, **changes)
        assert "could not use the task" in reason(reply), (kind, round_)
    assert hostile.ledger() == []
    (update,) = hostile.ask(run, TRAIN, 1, state)
    assert read_update(update), "and the agent goes on"


@pytest.mark.slow
def test_one_run_file_under_two_names_is_one_run_and_six_files_under_one_are_six(
    hostile: HostileServer,
) -> None:
    run = run_of()
    state = hostile.state(run)
    hostile.ask(run, TRAIN, 1, state)
    (again,) = hostile.ask(run, TRAIN, 1, state, named="study-2")
    assert "a privacy precondition does not hold there" in reason(again)
    assert "was answered before, as run study-1" in read_status(hostile.home)["last_error"]
    for seed in range(1, 6):
        other = run_of(run={"name": "study", "rounds": 1, "seed": seed})
        (reply,) = hostile.ask(other, TRAIN, 1, hostile.state(other))
        assert read_update(reply)
        drop_loaded_run(device_task(other).digest)
    assert len({line["charge"] for line in hostile.ledger() if "charge" in line}) == 6


@pytest.mark.slow
def test_a_run_that_the_owners_account_does_not_allow_is_refused_at_the_roll_call(
    rows: Path, tmp_path: Path
) -> None:
    with opened(
        rows, tmp_path, Policy(max_run_epsilon=9.0, max_total_epsilon=5.0, max_delta=1e-4)
    ) as hostile:
        loud = run_of(privacy=PRIVACY | {"noise_multiplier": 1e-2, "max_epsilon": 9.0})
        (reply,) = hostile.ask(loud, HELLO, 0)
        assert "a privacy precondition does not hold there" in reason(reply)
        (reply,) = hostile.ask(loud, TRAIN, 1, hostile.state(loud))
        assert "one round costs" in read_status(hostile.home)["last_error"]
        lavish = run_of(privacy=PRIVACY | {"noise_multiplier": 1.5})
        (reply,) = hostile.ask(lavish, HELLO, 0)
        assert reason(reply).endswith("refused by the agent's policy: policy.max_total_epsilon")
        assert hostile.ledger() == []


@pytest.mark.slow
def test_other_rows_in_the_middle_of_a_run_are_refused(rows: Path, tmp_path: Path) -> None:
    """The roll call's rows are the run's: until its first round they may change, and not later."""
    run = run_of(run={"name": "study", "rounds": 3}, privacy=None, federation={})

    def started(numbers: int) -> AbstractContextManager[HostileServer]:
        drop_loaded_run(device_task(run).digest)
        lines = (json.dumps({"prompt": f"{n} ", "answer": str(n)}) + "\n" for n in range(numbers))
        rows.write_text("".join(lines))
        return opened(rows, tmp_path)

    with started(8) as hostile:
        state = hostile.state(run)
        (first,) = hostile.ask(run, HELLO, 0)
    with started(20) as hostile:
        (second,) = hostile.ask(run, HELLO, 0)
        assert read_hello(first).examples < read_hello(second).examples
        assert read_update(hostile.ask(run, TRAIN, 1, state)[0])
    with started(8) as hostile:
        for kind, round_ in ((TRAIN, 2), (HELLO, 0)):
            (reply,) = hostile.ask(run, kind, round_, state)
            assert "its rows are not those that it answered the run's roll call with" in reason(reply)
    with started(20) as hostile:
        assert read_update(hostile.ask(run, TRAIN, 3, state)[0])
