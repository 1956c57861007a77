"""Waiting for a run's agents: until enough of them are there, hold the same base model and want the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flwr.serverapp import Grid

from fedpeft.config.deployment import clients_named
from fedpeft.config.sampling import cohort_size
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FederationError, FedPEFTError, UsageError
from fedpeft.rounds.buffered.in_flight import concurrency_problems
from fedpeft.transport.roster import Roster, roll_call
from fedpeft.transport.tasks import Task
from fedpeft_server.runs.control import Control
from fedpeft_server.store import Rules
from fedpeft_server.transport.grpc_grid import node_id

POLL_S, ASK_AGAIN_S = 0.1, 5.0
_AWAY_NAMED = 8


def agents_wanted(run: RunConfig, rules: Rules) -> int:
    """For how many agents a run waits: as its submitter says, else as the run file's partitioner does.

    Raises:
        UsageError: nobody says, or they are too few for a round's cohort.
    """
    wanted = rules.min_agents or len(rules.agents) or clients_named(run)
    if not wanted:
        raise UsageError("the run file doesn't say how many clients there are; give --min-agents")
    try:
        cohort_size(run.federation.sampling, wanted)
    except FederationError as error:
        raise UsageError(f"{error}; or give a larger --min-agents") from error
    crowd = concurrency_problems(run.federation.buffer, wanted) if run.federation.buffer is not None else []
    if crowd:
        raise UsageError(f"{crowd[0]}; or give a larger --min-agents")
    return wanted


def wait_for_agents(
    grid: Grid,
    task: Task,
    *,
    wanted: int,
    named: Sequence[str] = (),
    wait_s: float,
    control: Control,
    check: Callable[[Roster], None],
    waiting: Callable[[str], None],
    own_base: Callable[[str], int | None] = lambda client: None,
    plugins: str = "",
) -> Roster:
    """The roster of a run's agents, as soon as there is a sound one.

    Agents that refuse the run or cannot load it don't end the wait: owners may mend that, or others come.

    Args:
        named: the only agents that are asked, where the submitter named some; those away are said by name.
        wait_s: for how long at most; 0: as long as it takes.
        check: refuses a roster.
        waiting: told what is waited for, in one line, whenever that changes.
        own_base, plugins: see `roll_call`.

    Raises:
        FederationError: not within `wait_s`.
        Halt: the run was stopped.
    """
    began, said = time.monotonic(), ""

    def wait(reason: str, seconds: float) -> None:
        nonlocal said
        if reason != said:
            said = reason
            waiting(reason)
        if wait_s and time.monotonic() - began > wait_s:
            raise FederationError(f"{reason}; waited for {wait_s:g} s, submit it again when they are there")
        control.sleep(seconds)

    while True:
        here = set(grid.get_node_ids())
        if len(here) < wanted:
            away = [name for name in named if node_id(name) not in here]
            missing = f"; away: {', '.join(away[:_AWAY_NAMED])}" if away else ""
            wait(f"{len(here)} of {wanted} agents are connected{missing}", POLL_S)
            continue
        try:
            roster = roll_call(grid, task, expected=wanted, own_base=own_base, plugins=plugins)
            if len(roster.members) < wanted:
                raise FederationError(f"{len(roster.members)} of {wanted} agents answered the roll call")
            check(roster)
        except FedPEFTError as error:
            wait(" ".join(str(error).split()), ASK_AGAIN_S)
            continue
        return roster
