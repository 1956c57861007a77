"""The state's way down: every copy is the server's, whichever rounds its client missed; bytes are real."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from fedpeft.config.option_tables import build_option
from fedpeft.config.run_file import build_run, run_digest, run_json
from fedpeft.errors import FederationError, RunFileError, UpdateError
from fedpeft.flower.client_app import app
from fedpeft.flower.execute import execute
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.server_app import Order
from fedpeft.ledger.checkpoint import read_checkpoint
from fedpeft.ledger.records import ClientOutcome, Round, parse_row
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import set_loaded_run
from fedpeft.planning.plan import make_plan
from fedpeft.planning.preflight import refuse_problems
from fedpeft.rounds.downlink.broadcast import Broadcast
from fedpeft.rounds.downlink.replica import Replica, catch_up
from fedpeft.rounds.downlink.state_steps import CompressedSteps
from fedpeft.simulation.engine import serve
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.stages import STAGES, build_downlink
from fedpeft.transport.record_bytes import content_bytes
from fedpeft.transport.tasks import TRAIN, Task, task_content
from fedpeft.updates.update import Arrays, arrays_digest, freeze_arrays
from fedpeft.wire.codec import Envelope, encode
from fedpeft.wire.state_message import StateMessage, decode_state, encode_state
from fedpeft.workers import InlineWorkers
from tests.simulation.conftest import tiny_tables
from tests.simulation.runs import fingerprint, resumed, simulated

DIGEST = "ab" * 32
SHAPES = {"block.0.lora_A": (8, 40), "block.0.lora_B": (40, 8), "head": (6,)}
CLIENTS = [f"ward-{number}" for number in range(5)]
STAGE = {"kind": "ternary", "density": 0.1, "error_feedback": True}
EVERY_LOSSY = [kind for kind, stage in STAGES.items() if stage.role == "lossy"]


def steps(**options: Any) -> CompressedSteps:
    chosen = options or STAGE
    rest = {name: value for name, value in chosen.items() if name != "kind"}
    stage = build_option("downlink", STAGES, str(chosen["kind"]), rest)
    return CompressedSteps(DIGEST, 3, AdapterDelta(), stage)


def drawn(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def start() -> Arrays:
    return freeze_arrays({name: array.astype(np.float32) for name, array in drawn(0).items()})


def whole(state: Arrays) -> bytes:
    return encode(Envelope(state, DIGEST, 1, arrays_digest(state), "adapter-delta"))


def outcome(client: str, status: Any = "folded") -> ClientOutcome:
    return ClientOutcome(client=client, status=status)


class Course:
    """A server that holds rounds with some clients, each of which keeps what it was sent."""

    def __init__(self, broadcast: Broadcast, state: Arrays) -> None:
        self.broadcast, self.state = broadcast, state
        self.replicas: dict[str, Replica] = {}
        self.steps: dict[int, int] = {}  # bytes of each round's step
        self.held: dict[str, int] = {}  # the state that each client holds, by number

    def hold(self, number: int, cohort: list[str], change: dict[str, np.ndarray]) -> dict[str, int]:
        """A round; bytes that each client was sent."""
        message = whole(self.state)
        self.broadcast.open(number, message, arrays_digest(self.state))
        sizes = {}
        for name in cohort:
            payload = self.broadcast.payload(name)
            sizes[name] = len(payload)
            assert self.broadcast.size(name) == len(payload)
            self.receive(name, payload)
            assert self.replicas[name].digest == arrays_digest(self.state)
            self.held[name] = number - 1
            self.broadcast.record_outcome(outcome(name))
        step = self.broadcast.advance(self.state, change)
        self.state, self.steps[number] = step.state, len(step.payload)
        return sizes

    def receive(self, name: str, payload: bytes) -> None:
        message = decode_state(payload, who=name)
        self.replicas[name] = catch_up(message, self.replicas.get(name), steps())


def test_every_replica_is_the_servers_state_and_costs_the_smaller_of_steps_and_whole() -> None:
    course = Course(Broadcast(steps(), CLIENTS, shared=False), start())
    rng = np.random.default_rng(1)
    kinds = set()
    for number in range(1, 60):
        cohort = [name for name in CLIENTS[:4] if rng.random() < 0.5]
        cohort += CLIENTS[4:] if number in (1, 3, 50) else []  # one that is away for long
        before, full = dict(course.held), len(whole(course.state))
        sizes = course.hold(number, cohort, drawn(number, 0.1))
        for name, size in sizes.items():
            since = before.get(name)
            missed = math.inf if since is None else sum(course.steps[n] for n in range(since + 1, number))
            assert size - min(full, missed) in range(30, 45 + 4 * 60)  # digest and lengths
            kinds.add("steps" if missed < full else "whole" if since is None else "whole again")
    assert kinds == {"steps", "whole", "whole again"}


def test_what_is_sent_and_what_is_kept_add_up_to_all_changes() -> None:
    broadcast = Broadcast(steps(), CLIENTS, shared=False)
    course, total = Course(broadcast, start()), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for number in range(1, 31):
        change = drawn(number, 0.1)
        total = {name: total[name] + change[name] for name in SHAPES}
        course.hold(number, [], change)
    kept = broadcast.memory()
    for name, begin in start().items():
        sent = course.state[name].astype(np.float64) - begin
        np.testing.assert_allclose(sent + kept[f"memory/residual/{name}"], total[name], atol=1e-4)
        assert np.abs(sent).max() > 0.1
        assert np.abs(kept[f"memory/residual/{name}"]).max() > 0.01


def test_a_step_is_the_largest_entries_of_change_and_memory() -> None:
    made = steps(kind="top-k", density=0.1, error_feedback=True)
    state, memory = start(), {f"residual/{n}": a.astype(np.float32) for n, a in drawn(7, 0.05).items()}
    change = drawn(8, 0.05)
    step = made.make(1, state, change, memory)
    for name, shape in SHAPES.items():
        wanted = (change[name].astype(np.float32) + memory[f"residual/{name}"]).ravel()
        kept = np.argsort(-np.abs(wanted), kind="stable")[: max(1, round(0.1 * wanted.size))]
        moved = np.zeros(wanted.size)
        moved[kept] = wanted[kept]
        np.testing.assert_array_equal(
            step.state[name], (state[name] + moved.reshape(shape)).astype(np.float32)
        )
        left = np.where(moved == 0, wanted, 0.0).reshape(shape)
        np.testing.assert_allclose(step.memory[f"residual/{name}"], left, atol=1e-7)
    taken, announced = made.take(state, step.payload, who="a")
    assert arrays_digest(taken) == announced == arrays_digest(step.state)


@pytest.mark.parametrize("kind", EVERY_LOSSY)
def test_client_and_server_agree_to_the_bit_under_every_compressor(kind: str) -> None:
    made, state = steps(kind=kind), start()
    for number in (1, 2, 3):
        step = made.make(number, state, drawn(number), {})
        taken, announced = made.take(state, step.payload, who="a")
        assert arrays_digest(taken) == announced == arrays_digest(step.state)
        assert announced != arrays_digest(state)
        state = step.state


def test_a_restored_server_goes_on_to_the_bit() -> None:
    """Simulated clients keep what they hold; those of other processes are sent whole states again."""
    for shared in (True, False):
        one = Broadcast(steps(), CLIENTS, shared=shared)
        course, other = Course(one, start()), Broadcast(steps(), CLIENTS, shared=shared)
        for number in range(1, 4):
            message = whole(course.state)
            one.open(number, message, arrays_digest(course.state))
            one.record_outcome(outcome(CLIENTS[number]))
            course.state = one.advance(course.state, drawn(number)).state
        other.restore(one.memory())
        for broadcast in (one, other):
            broadcast.open(4, whole(course.state), arrays_digest(course.state))
        same = [one.size(name) == other.size(name) for name in CLIENTS]
        assert same == ([True] * 5 if shared else [True, False, False, False, True])
        assert one.size(CLIENTS[3]) < one.size(CLIENTS[0])
        steps_made = [broadcast.advance(course.state, drawn(9)) for broadcast in (one, other)]
        assert steps_made[0].payload == steps_made[1].payload
        assert arrays_digest(one.memory()) == arrays_digest(other.memory()) or not shared


def test_steps_that_are_kept_weigh_less_than_a_state() -> None:
    broadcast = Broadcast(steps(), CLIENTS, shared=False)
    course = Course(broadcast, start())
    for number in range(1, 80):
        course.hold(number, [], drawn(number))
    broadcast.open(80, whole(course.state), arrays_digest(course.state))
    kept = [array for name, array in broadcast.memory().items() if name.startswith("step/")]
    assert 3 < len(kept) < 60
    assert sum(array.size for array in kept) < len(whole(course.state))


def test_a_client_that_is_further_than_the_server_knows_is_served() -> None:
    """Its answer was lost: it holds the state, and the server sends the step to it again."""
    course = Course(Broadcast(steps(), CLIENTS, shared=False), start())
    course.hold(1, ["ward-0"], drawn(1))
    for number in (2, 3):
        course.broadcast.open(number, whole(course.state), arrays_digest(course.state))
        course.receive("ward-0", course.broadcast.payload("ward-0"))
        course.broadcast.record_outcome(outcome("ward-0", "late"))
        assert course.replicas["ward-0"].digest == arrays_digest(course.state)
        course.state = course.broadcast.advance(course.state, drawn(number)).state
    size = course.hold(4, ["ward-0"], drawn(4))["ward-0"]
    assert size < len(whole(course.state))


def test_a_client_that_failed_is_sent_the_whole_state() -> None:
    course = Course(Broadcast(steps(), CLIENTS, shared=False), start())
    course.hold(1, ["ward-0", "ward-1"], drawn(1))
    course.broadcast.record_outcome(outcome("ward-0", "failed"))
    course.broadcast.open(2, whole(course.state), arrays_digest(course.state))
    assert decode_state(course.broadcast.payload("ward-0"), who="a").whole
    assert decode_state(course.broadcast.payload("ward-1"), who="a").steps


def test_a_round_that_changes_nothing_costs_a_digest() -> None:
    course = Course(Broadcast(steps(), CLIENTS, shared=False), start())
    course.hold(1, CLIENTS, {})
    assert course.steps[1] == 0
    assert max(course.hold(2, CLIENTS, drawn(2)).values()) < 50


def test_wrong_states_and_steps_are_refused() -> None:
    state = start()
    step = steps().make(1, state, drawn(1), {})
    message = StateMessage(arrays_digest(step.state), steps=(step.payload,), keep=True)
    with pytest.raises(FederationError, match="no state is held here"):
        catch_up(message, None, steps())
    elsewhere = freeze_arrays({name: array + np.float32(1) for name, array in state.items()})
    with pytest.raises(FederationError, match="fingerprint"):
        catch_up(message, Replica(arrays_digest(elsewhere), elsewhere), steps())
    with pytest.raises(UpdateError, match="another run or downlink stage"):
        steps(kind="ternary", density=0.2).take(state, step.payload, who="a")
    with pytest.raises(UpdateError, match="no whole update message"):
        steps().take(state, step.payload[:-9], who="a")
    small = {name: array[:2] for name, array in state.items()}
    with pytest.raises(UpdateError):
        steps().take(small, step.payload, who="a")


def test_state_messages_that_are_none_are_refused() -> None:
    good = StateMessage(DIGEST, steps=(b"a", b"b"), keep=True)
    assert decode_state(encode_state(good), who="a") == good
    both = encode_state(StateMessage(DIGEST, b"whole", (b"step",)))
    for payload, needle in (
        (both, "in one message"),
        (b"\xff" * 40, "no state message"),
        (b"", "protocol version 0"),
        (encode_state(StateMessage("ab")), "bytes of digest"),
    ):
        with pytest.raises(UpdateError, match=needle):
            decode_state(payload, who="a")


@pytest.mark.parametrize(
    ("tables", "needle"),
    [
        ({"downlink": {"kind": "clip", "clip_norm": 1.0}}, r"downlink \(clip\): it compresses nothing"),
        ({"downlink": {"kind": "quantise", "bits": 3}}, r"downlink.bits \(quantise\)"),
        ({"downlink": {"kind": "squash"}}, "downlink: unknown kind 'squash'"),
        ({"downlink": {"kind": "quantise"}, "space": {"kind": "seed-scalars"}}, "exact integers"),
    ],
)
def test_what_makes_no_sense_is_refused(tables: dict[str, Any], needle: str) -> None:
    run = build_run({"run": {"name": "x", "rounds": 1}, **tables}, source="x")
    with pytest.raises(RunFileError, match=needle):
        refuse_problems(run, source="x")


def run_tables() -> dict[str, Any]:
    tables = tiny_tables() | {"downlink": STAGE}
    tables["federation"] = {"sampling": {"kind": "fixed", "cohort": 2}}
    return tables


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("downlink") / "run"
    simulated(run_tables(), out)
    return out


def rows(out: Path) -> list[Round]:
    parsed = [parse_row(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in parsed if isinstance(row, Round) and row.round]


def test_a_run_counts_what_each_client_would_be_sent(undisturbed: Path) -> None:
    seen: set[str] = set()
    for row in rows(undisturbed):
        assert row.down is not None
        assert row.down.cosine is not None
        assert 0.1 < row.down.cosine < 1
        assert row.down.message == pytest.approx(sum(o.bytes_down for o in row.outcomes) / 2)
        (plain, dense), (kind, coded) = row.down.stages
        assert (plain, kind) == ("plain", "ternary")
        for item in row.outcomes:
            assert (item.bytes_down > dense) == (item.client not in seen)
            assert item.bytes_down > dense or item.bytes_down < 4 * coded
            seen.add(item.client)
    assert any(item.bytes_down < 5000 for row in rows(undisturbed) for item in row.outcomes)


def test_the_plan_knows_what_a_step_weighs(undisturbed: Path) -> None:
    plan = make_plan(build_run(run_tables(), source="x"))
    assert plan.traffic is not None
    least = min(item.bytes_down for row in rows(undisturbed) for item in row.outcomes)
    assert plan.traffic.down_per_round == pytest.approx(least, rel=0.05)


def test_a_resumed_run_is_the_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "torn"
    simulated(run_tables(), out, workers=2)
    assert fingerprint(out) == fingerprint(undisturbed)
    digest = run_digest(build_run(run_tables(), source="test"))
    before = read_checkpoint(out / "checkpoints" / "round-000002.safetensors", digest)
    assert {name.split("/")[0] for name in before.downlink} == {"held", "memory", "step"}
    (out / "checkpoints" / "round-000003.safetensors").unlink()
    (out / "report.html").unlink()
    resumed(out)
    assert fingerprint(out) == fingerprint(undisturbed)


def test_clients_that_take_steps_train_as_those_that_are_handed_states(
    undisturbed: Path, tmp_path: Path
) -> None:
    """On a grid that shares no memory the messages are the ones that were counted, and change nothing."""
    run_file = tmp_path / "run.toml"
    run_file.write_text(tomli_w.dumps(run_tables()))
    grid = LocalGrid(4, InlineWorkers())
    serve(Order(grid, run_file, tmp_path / "out"))
    assert fingerprint(tmp_path / "out") == fingerprint(undisturbed)
    assert any("replica" in state for state in grid.states.values())


def test_damaged_messages_are_refused_or_lead_to_the_announced_state() -> None:
    """Whatever comes, a client trains from a state with the announced fingerprint, or not at all."""
    state = start()
    step = steps().make(1, state, drawn(1), {})
    good = encode_state(StateMessage(arrays_digest(step.state), steps=(step.payload,), keep=True))
    held, rng, read = Replica(arrays_digest(state), state), np.random.default_rng(0), 0
    for _ in range(3000):
        payload = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(payload)))
            if rng.random() < 0.3:
                del payload[place : place + int(rng.integers(1, 9))]
            else:
                payload[place] ^= 1 << int(rng.integers(8))
        try:
            message = decode_state(bytes(payload), who="a")
            replica = catch_up(message, held, steps())
        except (UpdateError, FederationError):
            continue
        read += 1
        assert replica.digest == message.state_digest == arrays_digest(replica.arrays)
    assert read < 100  # a changed byte of `keep` or an unknown field


def test_an_agent_that_stays_alive_needs_no_record_of_its_state(undisturbed: Path) -> None:
    """A resident worker whose caller keeps stage memory alone: the state stays in the process."""
    run = build_run(run_tables(), source="x")
    digest, stage = run_digest(run), build_downlink(run)
    resident = load_simulated_run(run)
    set_loaded_run(resident)
    assert stage is not None
    state = resident.space.initial_state(resident.parameters)
    made = CompressedSteps(digest, run.run.seed, resident.space, stage)
    name = resident.data.clients[0].name
    before = StateMessage(arrays_digest(state), whole(state), keep=True)
    step = made.make(1, state, {n: np.full(a.shape, 1e-3) for n, a in state.items()}, {})
    after = StateMessage(arrays_digest(step.state), steps=(step.payload,), keep=True)
    for number, message in ((1, before), (2, after)):
        task = Task(digest, number, encode_state(message), run_json(run))
        outcome = execute(app, TRAIN, str(number), content_bytes(task_content(task)), {}, client=name)
        assert outcome.error == ""
    assert outcome.memory == {}
