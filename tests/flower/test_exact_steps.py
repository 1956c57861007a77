"""What changed in the integers, sent instead of all of them: whoever takes it holds the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.sections import PeftSection
from fedpeft.errors import FederationError, UpdateError
from fedpeft.ledger.records import ClientOutcome
from fedpeft.models.attach import attach
from fedpeft.models.trainable import trainable_parameters
from fedpeft.rounds.downlink.broadcast import Broadcast
from fedpeft.rounds.downlink.exact_steps import ExactSteps, steps_of
from fedpeft.rounds.downlink.replica import Replica, catch_up
from fedpeft.seedspace.digest import digest
from fedpeft.spaces import Space, Trail, build_space
from fedpeft.updates.update import Arrays, arrays_digest
from fedpeft.wire.codec import Envelope, encode
from fedpeft.wire.state_message import decode_state
from tests.models.tiny import tiny_base

SPACES: dict[str, dict[str, Any]] = {
    "fedkseed": {"kind": "seed-scalars", "num_seeds": 1024},
    "fedkseed-pro": {"kind": "seed-scalars", "mode": "fedkseed-pro", "num_seeds": 1024},
    "common": {"kind": "seed-scalars", "mode": "common", "num_seeds": 128},
    "projected": {"kind": "projected", "num_seeds": 64},
}
CLIENTS = ("always", "late", "sometimes")


def opened(name: str) -> tuple[nn.Module, Space, ExactSteps]:
    kind = "first-order" if name == "projected" else "zeroth-order"
    tables = {
        "run": {"name": "x", "rounds": 9},
        "training": {"kind": kind, "lr": 1e-3},
        "space": SPACES[name],
    }
    run = build_run(tables, source="test")
    model = attach(tiny_base("llama"), PeftSection(method="ln-tuning"), task="causal-lm", seed=0)
    space = build_space(run, model)
    steps = steps_of(run, run_digest(run), space)
    assert isinstance(steps, ExactSteps)
    return model, space, steps


def whole(space: Space, state: Arrays, number: int) -> tuple[bytes, str]:
    named = arrays_digest(state)
    return encode(Envelope(state, "", number, named, space.kind)), named


def change_of(space: Space, state: Arrays, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    _, update = space.example(state, 128, rng)
    return {name: array.astype(np.float64) for name, array in update.items()}


@pytest.mark.parametrize("name", sorted(SPACES))
def test_veterans_late_joiners_and_those_who_missed_rounds_hold_one_model(name: str) -> None:
    """Everyone catches up in a round of its own, and writes weights of its own."""
    _, space, steps = opened(name)
    models = {client: opened(name) for client in CLIENTS}
    broadcast, rng = Broadcast(steps, CLIENTS, shared=False), np.random.default_rng(0)
    held: dict[str, Replica] = {}
    state = space.initial_state({})
    took_steps = 0
    for number in range(1, 7):
        broadcast.open(number, *whole(space, state, number))
        asked = [client for client in CLIENTS if client == "always" or number == 6]
        asked += ["sometimes"] if number == 3 else []
        for client in asked:
            message = decode_state(broadcast.payload(client), who="s")
            took_steps += len(message.steps)
            held[client] = catch_up(message, held.get(client), models[client][2])
            assert held[client].digest == arrays_digest(state)
            model, own, _ = models[client]
            own.enter(trainable_parameters(model), held[client].arrays)
            broadcast.record_outcome(ClientOutcome(client=client, status="folded"))
        if number < 6:
            state = broadcast.advance(state, change_of(space, state, rng)).state
    assert len({digest(dict(model.named_parameters())) for model, _, _ in models.values()}) == 1
    assert took_steps >= 4
    assert state["amounts"].any()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**20), 2**20), min_size=5, max_size=5), min_size=1, max_size=3))
def test_a_step_tells_exactly_what_changed(changes: list[list[int]]) -> None:
    space, steps = _FEDKSEED[1:]
    state = space.initial_state({})
    for number, change in enumerate(changes, start=1):
        step = steps.make(number, state, {"amounts": padded(change).astype(np.float64)}, {})
        came, leads_to = steps.take(state, step.payload, who="s")
        assert leads_to == arrays_digest(came) == arrays_digest(step.state)
        state = came
    assert state["amounts"].tolist() == np.sum([padded(change) for change in changes], axis=0).tolist()


def padded(amounts: list[int]) -> np.ndarray[Any, Any]:
    """On the last of 1024 seeds, every other one."""
    result = np.zeros(1024, dtype=np.int64)
    result[-2 * len(amounts) :: 2] = amounts
    return result


_FEDKSEED = opened("fedkseed")


def test_a_missed_round_costs_its_own_step_and_never_more_than_the_whole_state() -> None:
    space, steps = _FEDKSEED[1:]
    broadcast, rng = Broadcast(steps, ["a", "b"], shared=False), np.random.default_rng(1)
    state = space.initial_state({})
    sizes = []
    for number in range(1, 12):
        broadcast.open(number, *whole(space, state, number))
        sizes.append((broadcast.size("a"), broadcast.size("b")))
        broadcast.record_outcome(ClientOutcome(client="a", status="folded"))
        if number == 1:
            broadcast.record_outcome(ClientOutcome(client="b", status="folded"))
        if number == 11:
            assert sizes[-1][1] <= len(whole(space, state, number)[0]) + 64
        state = broadcast.advance(state, change_of(space, state, rng)).state
    assert all(a == b for a, b in sizes[:2])
    assert all(a < b for a, b in sizes[2:])


def test_steps_from_elsewhere_or_to_nowhere_are_refused() -> None:
    space, steps = _FEDKSEED[1:]
    state = space.initial_state({})
    step = steps.make(1, state, {"amounts": np.arange(1024.0)}, {})
    other = ExactSteps("ab" * 32, space)
    with pytest.raises(UpdateError, match="another run"):
        other.take(state, step.payload, who="s")
    with pytest.raises(UpdateError, match="s:"):
        steps.take(state, step.payload[:-9], who="s")
    message = decode_state(_message(steps, step.payload, arrays_digest(step.state)), who="s")
    altered = {**state, "amounts": state["amounts"] + 1}
    with pytest.raises(FederationError, match="nothing was trained"):
        catch_up(message, Replica(arrays_digest(altered), altered), steps)
    with pytest.raises(FederationError, match="no state is held"):
        catch_up(message, None, steps)


def _message(steps: ExactSteps, payload: bytes, leads_to: str) -> bytes:
    from fedpeft.wire.state_message import StateMessage, encode_state

    return encode_state(StateMessage(leads_to, steps=(payload,), keep=True))


def test_published_sizes_take_a_kilobyte_up_and_a_third_of_eight_down() -> None:
    """K = 4096, 200 steps, ten clients a round, half-way through a run: whole messages, as they are sent."""
    tables = {
        "run": {"name": "x", "rounds": 40},
        "training": {"kind": "zeroth-order", "lr": 3e-7, "steps": 200},
        "space": {"kind": "seed-scalars", "num_seeds": 4096},
    }
    run = build_run(tables, source="test")
    model = attach(tiny_base("llama"), PeftSection(method="ln-tuning"), task="causal-lm", seed=0)
    space, rng = build_space(run, model), np.random.default_rng(2)
    steps = steps_of(run, run_digest(run), space)
    assert steps is not None
    state, _ = space.example(space.initial_state({}), 200, rng)
    updates = [space.example(state, 200, rng)[1]["amounts"] for _ in range(10)]
    step = steps.make(21, state, {"amounts": np.mean(updates, axis=0)}, {})
    broadcast = Broadcast(steps, ["a"], shared=False)
    broadcast.restore({})
    broadcast.open(21, *whole(space, state, 21))
    broadcast.record_outcome(ClientOutcome(client="a", status="folded"))
    broadcast.advance(state, {"amounts": np.mean(updates, axis=0)})
    broadcast.open(22, *whole(space, step.state, 22))
    down = broadcast.size("a")
    up = len(
        encode(Envelope({"amounts": updates[0]}, "ab" * 32, 21, "cd" * 32, space.kind, "client-07", 999))
    )
    everything = len(whole(space, step.state, 22)[0])
    print(f"up {up}, down {down}, whole {everything}")
    assert up <= 1024
    assert down <= 8192 // 3 + 512
    assert down < everything


def test_a_trail_is_expressed_once_however_the_state_came() -> None:
    """An update names the state that it starts from; one that was caught up in steps is that state."""
    space, steps = _FEDKSEED[1:]
    state = space.initial_state({})
    step = steps.make(1, state, {"amounts": np.arange(1024.0)}, {})
    came, _ = steps.take(state, step.payload, who="s")
    trail = Trail(np.array([3, 3, 5]), np.array([1, 1, -7]))
    ours, theirs = space.express({}, came, trail), space.express({}, step.state, trail)
    assert ours["amounts"].tolist() == theirs["amounts"].tolist()
    assert replace(trail).amounts.tolist() == [1, 1, -7]
