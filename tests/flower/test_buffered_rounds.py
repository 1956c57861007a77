"""Buffered rounds against FedBuff written down plainly; restarts, workers, and clients that fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedpeft.aggregation.staleness import UNIT, weight_problems, weight_units
from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.sections import BufferSection, RunConfig, StalenessSection
from fedpeft.errors import FederationError, QuorumError, StateError, TrainingError
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.checkpoint import checkpoint_bytes, parse_checkpoint
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.rounds.buffered.in_flight import InFlightTasks
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.round_loop import initial_checkpoint, run_rounds
from fedpeft.rounds.simulated_clock import VirtualClock
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.spaces.seed_modes import AMOUNTS, NEXT, CommonDirections
from fedpeft.stages import build_stages
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.transport.roster import Member, Roster, roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import freeze_arrays
from fedpeft.workers import InlineWorkers, ProcessWorkers, Workers
from tests.flower.buffered_apps import EXAMPLES, point, weight

START = {"a": np.array([[0.0, 4.0], [-8.0, 2.0]], dtype=np.float32), "b": np.ones(1, dtype=np.float32)}
GONE_S = 30.0  # after which those who left would be given up without a look
CLOCK = {"examples_per_s": 2.0, "speed_sigma": 0.9, "latency_s": 0.25, "bytes_per_s": 1e9}


@dataclass
class Ledger:
    """A journal with a memory, and an observer."""

    committed: dict[int, bytes] = field(default_factory=dict)
    shown: list[ClientOutcome] = field(default_factory=list)
    opened: list[tuple[int, Cohort]] = field(default_factory=list)
    waiting: Sequence[tuple[str, int]] = ()

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        self.opened.append((number, draw()))
        return self.opened[-1][1]

    def commit(self, checkpoint: Checkpoint) -> None:
        self.committed[checkpoint.round] = checkpoint_bytes(checkpoint)

    def checkpoint(self, number: int) -> Checkpoint:
        if number not in self.committed:
            raise StateError(f"round {number} is not kept")
        return self.read(number)

    def list_uncommitted(self) -> Sequence[tuple[str, int]]:
        return self.waiting

    def round_started(self, number: int, asked: int) -> None: ...

    def client_done(self, outcome: ClientOutcome) -> None:
        self.shown.append(outcome)

    def round_done(self, row: Round) -> None: ...

    def read(self, number: int) -> Checkpoint:
        from pathlib import Path

        content = self.committed[number]
        return parse_checkpoint(content, Path("memory"), _digest_of(content))

    @property
    def rows(self) -> list[Round]:
        return [self.read(number).row for number in sorted(self.committed)]

    def results(self) -> list[Any]:
        """All that two equal runs share."""
        read = [self.read(number) for number in sorted(self.committed)]
        return [
            (
                {name: array.tobytes() for name, array in checkpoint.state.items()},
                {name: array.tobytes() for name, array in checkpoint.pending.items()},
                checkpoint.row.model_copy(update={"wall_s": 0.0}),
            )
            for checkpoint in read
        ]


def _digest_of(content: bytes) -> str:
    import json

    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fedpeft"])
    return str(header["run"])


def run_of(rounds: int = 5, buffer: Mapping[str, Any] | None = None, **federation: Any) -> RunConfig:
    section = {"size": 3, "concurrency": 6} | dict(buffer or {})
    tables = {
        "run": {"name": "t", "rounds": rounds},
        "training": {"steps": 1, "batch_size": EXAMPLES},
        "federation": {"mode": "buffered", "buffer": section, "clock": CLOCK} | federation,
    }
    return build_run(tables, source="test")


class Deserted(PolledGrid):
    """A grid that some nodes have left for good: what they are sent is never answered."""

    def __init__(self, inner: LocalGrid, gone: set[int]) -> None:
        self._inner, self._gone = inner, gone

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            node = message.metadata.dst_node_id
            yield f"gone-{node}" if node in self._gone else next(iter(self._inner.push_messages([message])))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._inner.pull_messages([id_ for id_ in message_ids if not id_.startswith("gone-")])

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def has_given_up(self, nodes: Collection[int]) -> bool:
        return self._gone.issuperset(nodes)

    def is_gone(self, node: int) -> bool:
        return node in self._gone


def held(
    run: RunConfig,
    *,
    clients: int = 6,
    workers: Workers | None = None,
    ledger: Ledger | None = None,
    start: int | None = None,
    app: str = "honest",
    gone: Collection[str] = (),
    timeout_s: float = GONE_S,
) -> Ledger:
    """Hold a run, from the start or going on after a committed round; `gone` left after the roll call."""
    ledger = ledger or Ledger()
    grid = LocalGrid(clients, workers or InlineWorkers(), f"tests.flower.buffered_apps:{app}")
    digest = run_digest(run)
    roster = roll_call(grid, Task(digest, 0, b""), expected=clients)
    federation = RoundContext(
        run=run,
        digest=digest,
        grid=Deserted(grid, {roster.members[name].node_id for name in gone}) if gone else grid,
        roster=roster,
        space=AdapterDelta(),
        stages=build_stages(run),
        journal=ledger,
        observer=ledger,
        evaluate=lambda state: None,
        memory=grid,
        history=ledger,
        timeout_s=timeout_s if gone else None,
    )
    first = (
        initial_checkpoint(federation, freeze_arrays(START)) if start is None else ledger.checkpoint(start)
    )
    run_rounds(federation, first)
    return ledger


def fedbuff(
    run: RunConfig, clients: int, size: int, exponent: float
) -> list[tuple[float, list[tuple[int, int]], dict[str, Any]]]:
    """Algorithm 1 in floats, all clients at work at all times: time, (client, age) folded, and state."""
    assert run.federation.clock is not None
    clock = VirtualClock(run.federation.clock, run.run.seed)
    state = {name: array.astype(np.float64) for name, array in START.items()}
    now, course = 0.0, []
    idle, working = set(range(clients)), {}
    for version in range(run.run.rounds):
        for client in sorted(idle):
            took = clock.fate(
                f"client-{client}", version + 1, examples=EXAMPLES, bytes_down=0, bytes_up=0
            ).arrives_s
            update = {name: (point(client) - array) / 2 for name, array in state.items()}
            working[client] = (now + took, version, update)
        idle, total, weights, folded = set(), dict.fromkeys(state, 0.0), 0, []
        for _ in range(size):
            client = min(working, key=lambda number: working[number][0])
            now, began, update = working.pop(client)
            idle.add(client)
            scale = (1.0 + version - began) ** -exponent
            total = {name: total[name] + scale * weight(client) * update[name] for name in state}
            weights += weight(client)
            folded.append((client, version - began))
        state = {name: state[name] + total[name] / weights for name in state}
        course.append((now, folded, state))
    return course


@pytest.mark.parametrize(("size", "exponent"), [(3, 0.5), (2, 0.0), (4, 2.0), (1, 0.5), (6, 0.5)])
def test_rounds_are_those_of_the_published_algorithm(size: int, exponent: float) -> None:
    weights = {"kind": "polynomial", "exponent": exponent}
    run = run_of(8, {"size": size, "max_staleness": 10, "staleness_weight": weights})
    ledger, now = held(run), 0.0
    for number, (then, folded, state) in enumerate(fedbuff(run, 6, size, exponent), start=1):
        read = ledger.read(number)
        now += read.row.virtual_s or 0.0
        assert now == pytest.approx(then, abs=1e-3)  # messages take microseconds on this clock
        came = [(int(item.client[-1]), item.staleness) for item in read.row.outcomes]
        assert came == folded, "the row names them in the order in which they were folded"
        assert [sum(age == s for _, age in folded) for s in range(len(read.row.staleness))] == list(
            read.row.staleness
        )
        for name in START:  # weights are whole 1024ths: at most half of one off, of updates below 64
            np.testing.assert_allclose(read.state[name], state[name], rtol=0, atol=number * 64 / UNIT)
            if exponent == 0.0:
                np.testing.assert_allclose(read.state[name], state[name], rtol=1e-5, atol=1e-5)


def test_one_round_by_hand() -> None:
    """Two updates, one of them one round old, in whole numbers."""
    even = CLOCK | {"speed_sigma": 0.2}
    run = run_of(2, {"size": 1, "concurrency": 2, "staleness_weight": "polynomial"}, clock=even)
    ledger = held(run, clients=2)
    (first,), (second,) = (ledger.read(number).row.outcomes for number in (1, 2))
    assert (first.staleness, second.staleness) == (0, 1), (
        "this seed: the slower one comes in the second round"
    )
    quick, slow = int(first.client[-1]), int(second.client[-1])
    after = 1.0 + (point(quick) - 1.0) / 2  # b starts at 1; nothing else is in the buffer
    assert ledger.read(1).state["b"][0] == after
    units = 724  # 1024 / sqrt(2) = 724.08
    assert ledger.read(2).state["b"][0] == np.float32(after + (point(slow) - 1.0) / 2 * units / 1024)


@pytest.mark.parametrize(
    ("section", "units"),
    [
        ({"kind": "constant"}, [1024] * 6),
        ({"kind": "polynomial"}, [1024, 724, 591, 512, 458, 418]),
        ({"kind": "polynomial", "exponent": 1.0}, [1024, 512, 341, 256, 205, 171]),
        ({"kind": "hinge", "slope": 1.0, "after": 2}, [1024, 1024, 1024, 512, 341, 256]),
        ({"kind": "polynomial", "exponent": 30.0}, [1024, 1, 1, 1, 1, 1]),
    ],
)
def test_weights_in_units_of_a_1024th(section: dict[str, Any], units: list[int]) -> None:
    weigh = weight_units(StalenessSection.model_validate(section))
    assert [weigh(age) for age in range(6)] == units


def test_a_weight_that_would_be_nothing_is_refused() -> None:
    steep = {"kind": "polynomial", "exponent": 3.0}
    section = {"size": 1, "concurrency": 1, "staleness_weight": steep}
    assert weight_problems(BufferSection.model_validate({**section, "max_staleness": 11})) == []
    (problem,) = weight_problems(BufferSection.model_validate({**section, "max_staleness": 12}))
    assert "12 rounds old would weigh 0.00046" in problem


def test_any_number_of_workers_gives_the_same_bytes() -> None:
    run = run_of(6, {"max_staleness": 2}, clock=CLOCK | {"dropout": 0.1, "availability": 0.8})
    inline = held(run, clients=9).results()
    for width in (2, 3):
        workers = ProcessWorkers(width)
        try:
            assert held(run, clients=9, workers=workers).results() == inline
        finally:
            workers.close()


@pytest.mark.parametrize("after", range(7))
def test_a_run_that_goes_on_after_any_round_ends_in_the_same_bytes(after: int) -> None:
    run = run_of(7, {"size": 2, "max_staleness": 3}, clock=CLOCK | {"dropout": 0.1}, deadline_s=20.0)
    whole = held(run, clients=9)
    assert any(row.outcomes[0].staleness for row in whole.rows if row.outcomes), "work crosses rounds"
    ledger = Ledger({number: content for number, content in whole.committed.items() if number <= after})
    held(run, clients=9, ledger=ledger, start=after)
    assert ledger.results() == whole.results()


def test_without_the_states_that_clients_work_on_it_does_not_go_on() -> None:
    run = run_of(4, {"size": 1, "concurrency": 6})
    whole = held(run)
    with pytest.raises(StateError, match="not kept"):
        held(run, ledger=Ledger({3: whole.committed[3]}), start=3)


def test_work_that_is_too_old_is_given_up_and_never_counted() -> None:
    run = run_of(30, {"size": 1, "concurrency": 6, "max_staleness": 4})
    outcomes = [(row.round, item) for row in held(run).rows for item in row.outcomes]
    assert max(item.staleness or 0 for _, item in outcomes if item.status == "folded") <= 4
    lost = [item for _, item in outcomes if item.status == "late"]
    assert lost, "this seed has clients so slow that five rounds end while they work"
    assert {item.staleness for item in lost} == {5}
    assert all("5 rounds ended while it worked, max_staleness is 4" in item.reason for item in lost)
    again = {item.client for _, item in outcomes if item.status == "folded"}
    assert {item.client for item in lost} <= again | {item.client for item in lost}


def test_no_client_is_in_a_row_twice_nor_works_twice_at_a_time() -> None:
    ledger = held(run_of(12, {"size": 3, "concurrency": 4}), clients=9)
    for row in ledger.rows:
        names = [item.client for item in row.outcomes]
        assert len(set(names)) == len(names)
    for _, cohort in ledger.opened:
        assert len(cohort.asked) == 4, "as many as the concurrency are at work when a round begins"


def test_one_that_vanishes_keeps_its_place_until_it_is_given_up() -> None:
    run = run_of(12, {"size": 2, "concurrency": 4, "max_staleness": 2}, clock=CLOCK | {"dropout": 0.1})
    outcomes = [item for row in held(run, clients=9).rows for item in row.outcomes]
    assert {"folded", "late"} == {item.status for item in outcomes}
    with_deadline = run_of(12, {"size": 2, "concurrency": 4}, clock=CLOCK | {"dropout": 0.4}, deadline_s=9.0)
    outcomes = [item for row in held(with_deadline, clients=9).rows for item in row.outcomes]
    assert {"folded", "late", "dropped"} >= {item.status for item in outcomes}
    assert all((item.virtual_s or 0) <= 9.0 + 1e-9 for item in outcomes)
    dropped = [item for item in outcomes if item.status == "dropped"]
    assert dropped
    assert all(item.virtual_s == pytest.approx(9.0) for item in dropped)


def test_one_that_has_left_frees_its_place_for_those_who_are_here() -> None:
    """As soon as that is known, not when a round's time is over; also where both places were theirs."""
    run = run_of(2, {"size": 3, "concurrency": 2}, clock=None)
    gone = {"client-0", "client-2"}
    began = time.monotonic()
    rows = held(run, clients=6, gone=gone).rows[1:]
    assert time.monotonic() - began < GONE_S
    assert [sum(item.status == "folded" for item in row.outcomes) for row in rows] == [3, 3]
    late = {item.client: item.reason for row in rows for item in row.outcomes if item.status == "late"}
    assert late.keys() <= gone
    assert late
    assert set(late.values()) == {"no answer in time, or it left"}


def test_a_round_does_without_those_who_left_once_the_others_are_its_quorum() -> None:
    run = run_of(1, {"size": 4, "concurrency": 4}, clock=None, quorum=0.5)
    began = time.monotonic()
    (row,) = held(run, clients=4, gone={"client-1", "client-3"}).rows[1:]
    assert time.monotonic() - began < GONE_S
    assert sorted(item.client for item in row.outcomes if item.status == "folded") == ["client-0", "client-2"]


def test_where_nobody_is_left_all_are_waited_for() -> None:
    """Giving them up would have the run tried again, and each of them charged again for nothing."""
    run = run_of(1, {"size": 2, "concurrency": 2}, clock=None)
    began = time.monotonic()
    with pytest.raises(QuorumError, match="0 of 2 updates came"):
        held(run, clients=3, gone={"client-0", "client-1", "client-2"}, timeout_s=0.6)
    assert time.monotonic() - began >= 0.6


def test_a_failing_client_is_replaced() -> None:
    ledger = held(run_of(4, {"size": 3, "concurrency": 3}), clients=9, app="one_fails")
    outcomes = [item for row in ledger.rows for item in row.outcomes]
    assert {item.client for item in outcomes if item.status == "failed"} == {"client-1"}
    assert all(sum(item.status == "folded" for item in row.outcomes) == 3 for row in ledger.rows[1:])


def test_a_buffer_that_nobody_can_fill_ends_with_what_the_quorum_allows() -> None:
    run = run_of(2, {"size": 3, "concurrency": 3})
    rows = held(run, clients=3, app="one_fails").rows
    assert [sum(item.status == "folded" for item in row.outcomes) for row in rows[1:]] == [2, 2]
    assert rows[1].notes == ("the round ended with 2 of 3 updates: nobody was left",)
    strict = run_of(2, {"size": 3, "concurrency": 3}, quorum=1.0)
    with pytest.raises(TrainingError, match=r"round 1: 2 of 3 updates came, the quorum is 3.*client-1"):
        held(strict, clients=3, app="one_fails")
    with pytest.raises(TrainingError, match=r"0 of 3 updates came"):
        held(run, clients=3, app="all_fail")
    gone = run_of(2, {"size": 3, "concurrency": 3}, clock=CLOCK | {"dropout": 0.99})
    with pytest.raises(QuorumError, match=r"set federation.deadline_s"):
        held(gone, clients=3)


def test_more_than_there_are_clients_is_refused() -> None:
    with pytest.raises(FederationError, match=r"buffer.size: 7 updates .* there are 6 clients"):
        held(run_of(1, {"size": 7, "concurrency": 2}))
    with pytest.raises(FederationError, match=r"buffer.concurrency: 7 clients .* there are 6 clients"):
        held(run_of(1, {"size": 2, "concurrency": 7}))


def test_clients_are_asked_evenly() -> None:
    """60 clients, 6 at work, 600 askings: each 10 times; 40 is far outside of what chance would do."""
    roster = Roster({f"client-{number:02}": Member(number + 1, EXAMPLES) for number in range(60)}, "")
    run = run_of(200, {"size": 3, "concurrency": 6}, clock={"speed_sigma": 0.0})
    flights, asked = InFlightTasks(run, roster, {}), dict.fromkeys(roster.members, 0)
    for number in range(1, 201):
        flights.open(number)
        for _ in range(4):
            for flight in flights.fill(lambda _: 0, 0):
                asked[flight.client] += 1
            landed = flights.next_by_clock()
            assert landed is not None
            if _ < 3:
                flights.land(landed, ClientOutcome(client=landed.client, status="folded"))
    assert sum(asked.values()) >= 600
    assert min(asked.values()) >= 2
    assert max(asked.values()) <= 25


def test_common_directions_of_several_rounds_are_summed_side_by_side() -> None:
    mode = CommonDirections(per_round=2, rounds=4, window=3)
    update = {AMOUNTS: np.array([5, -7])}
    assert mode.layout()[AMOUNTS][0] == (2,)
    assert mode.sum_layout()[AMOUNTS][0] == (6,)
    assert mode.align(update, 0)[AMOUNTS].tolist() == [5, -7, 0, 0, 0, 0]
    assert mode.align(update, 2)[AMOUNTS].tolist() == [0, 0, 0, 0, 5, -7]
    state = {AMOUNTS: np.array([1, 2, 3, 4, 0, 0, 0, 0]), NEXT: np.array([4])}
    change = {AMOUNTS: np.array([10.4, -10.6, 1.0, 1.0, 100.0, -100.0])}
    after = mode.apply(state, change)
    assert after[AMOUNTS].tolist() == [101, -98, 4, 5, 10, -11, 0, 0]
    assert after[NEXT].tolist() == [6]
    early = mode.apply(mode.start(), change | {AMOUNTS: np.array([3.0, 4.0, 0, 0, 0, 0])})
    assert early[AMOUNTS].tolist() == [3, 4, 0, 0, 0, 0, 0, 0]
    assert CommonDirections(2, 4).align(update, 0) is update


def test_who_joins_is_drawn_from_its_round_on_and_work_under_way_stays_whose_it_is() -> None:
    """The newcomer's name sorts before all others', which a checkpoint's places must not mind."""
    run = run_of(9, {"size": 2, "concurrency": 2}, clock=None)
    old = {f"client-{number}": Member(number + 1, EXAMPLES) for number in range(3)}
    flights = InFlightTasks(run, Roster(old, ""), {})
    flights.open(1)
    working = {flight.client for flight in flights.fill(lambda _: 0, 0)}
    before = flights.memory()
    larger = Roster({**old, "another": Member(9, EXAMPLES, since=3)}, "")
    flights.admit(larger)
    assert {name: array.tolist() for name, array in flights.memory().items()} == {
        name: array.tolist() for name, array in before.items()
    }
    assert InFlightTasks(run, larger, before).working.keys() == working
    for number in (2, 3):
        flights.open(number)
        turns = set(flights._turns)
        assert turns == set(old) | ({"another"} if number == 3 else set())
