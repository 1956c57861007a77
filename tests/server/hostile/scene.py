"""A federation with certificates in one process: three honest agents, and whoever attacks them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from flwr.app import Message

from fedpeft.config.run_file import build_run
from fedpeft.credentials import Authority, Identity, Material, PeerCheck, Role, create_authority, new_key
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.round_loop import initial_checkpoint, run_rounds
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.stages import build_stages
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import TRAIN, Task, task_content
from fedpeft.updates.update import Arrays, arrays_digest, freeze_arrays
from fedpeft_client.agent import Agent
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from fedpeft_server.store import Rules, Store, StoredRun
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from fedpeft_server.transport.grpc_grid import RunIdentity, node_id
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.refusals import Reason
from fedpeft_server.transport.serving import RunningServer, serve
from fedpeft_server.transport.tls import certificate_doors
from tests.server.fleet import played, wait_for
from tests.server.hostile.apps import TABLES, WEIGHTS, mean

HONEST = sorted(WEIGHTS)
PATIENCE_S = 90.0  # for what takes milliseconds on an idle machine
START = {"a": np.zeros((2, 3), dtype=np.float32), "b": np.ones(4000, dtype=np.float32)}

# Small enough for every bound to be met in a second, and still far from what honest agents need.
BOUNDS = TransportOptions(
    max_inline_bytes=4096,  # the array b, up and down, is larger: it travels as a blob
    chunk_bytes=8192,
    upload_credits=1,
    download_credits=1,
    heartbeat_s=10.0,  # a machine that is busy elsewhere shall not cut the honest three
    stall_s=1.5,
    turn_s=0.5,
    hello_s=1.5,
    handshake_s=1.5,
    max_streams=8,
    messages_per_s=20.0,
    sessions_per_minute=20,
    bytes_per_hour=4 << 20,
    refusals_per_hour=10,
    drain_s=0.5,
)


@dataclass
class Scene:
    """A running server with the honest three connected.

    Attributes:
        kind: of the runs that it holds, as in `apps.TABLES`.
    """

    authority: Authority
    running: RunningServer
    store: Store
    kind: str
    runs: int = 0
    max_streams: int = BOUNDS.max_streams

    def device(self, name: str, role: Role = Role.AGENT) -> Material:
        """A new member's key and certificate."""
        key = new_key()
        issued = self.authority.device(key.public_key(), Identity(name, role), datetime.now(UTC))
        return Material(key, parse_certificate(issued, "test"), self.authority.certificate)

    def hold(self, extra: str = "") -> str:
        """A new run of the honest three, and of one more member, to its end; its last state's digest."""
        members = sorted([*HONEST, extra] if extra else HONEST)
        stored, notes = self._submitted(), _Notes(self.running)
        grid = self.running.grid(RunIdentity(stored.id, stored.digest), agents=members)
        wait_for(lambda: grid.agents_here == members, PATIENCE_S)
        roster = roll_call(grid, Task(stored.digest, 0, b""), expected=len(members), timeout_s=PATIENCE_S)
        made = RoundContext(
            run=stored.run,
            digest=stored.digest,
            grid=grid,
            roster=roster,
            space=AdapterDelta(),
            stages=build_stages(stored.run),
            journal=self.store.rounds(stored),
            observer=notes,
            evaluate=lambda state: None,
            timeout_s=PATIENCE_S,
        )
        last = run_rounds(made, initial_checkpoint(made, freeze_arrays(START)))
        statuses = [(o.client, o.status) for o in notes.outcomes if o.client in HONEST]
        assert sorted(statuses) == sorted((name, "folded") for name in HONEST * stored.run.run.rounds)
        assert {o.status for o in notes.outcomes if o.client == extra} <= {"refused", "failed"}
        return arrays_digest(last.state)

    @contextmanager
    def bait(self, name: str, sizes: list[int]) -> Iterator[None]:
        """Tasks of another run for one agent, whose states have these sizes in bytes."""
        stored = self._submitted()
        grid = self.running.grid(RunIdentity(stored.id, stored.digest), max_result_bytes=1 << 20)
        grid.know([name])
        states = [bytes([number]) * size for number, size in enumerate(sizes)]
        contents = [task_content(Task(stored.digest, 1, state)) for state in states]
        ids = list(
            grid.push_messages(Message(content, node_id(name), TRAIN, group_id="1") for content in contents)
        )
        try:
            yield
        finally:
            grid.cancel(ids)

    def _submitted(self) -> StoredRun:
        self.runs += 1
        name = f"{self.kind}-{self.runs}"
        run = build_run(TABLES[self.kind] | {"run": {"name": name, "rounds": 2}}, source="test")
        return self.store.runs.submit(run, Rules(), submission=name, submitter="test")


@dataclass
class _Notes:
    """An observer that tells the server of refused updates, as a daemon's runs do."""

    running: RunningServer
    outcomes: list[ClientOutcome] = field(default_factory=list)

    def round_started(self, number: int, asked: int) -> None: ...

    def client_done(self, outcome: ClientOutcome) -> None:
        self.outcomes.append(outcome)
        if outcome.status == "refused":
            self.running.count_refusal(outcome.client, Reason.UPDATE, outcome.reason)

    def round_done(self, row: Round) -> None: ...


@contextmanager
def scene(folder: Path, kind: str, options: TransportOptions = BOUNDS) -> Iterator[Scene]:
    """A scene whose files lie in `folder`."""
    now = datetime.now(UTC)
    authority = create_authority(folder / "ca", now)
    key = new_key()
    shown = parse_certificate(authority.server(key.public_key(), ["127.0.0.1"], now), "test")
    peers = PeerCheck(authority.certificate, authority.revoked_file)
    doors = certificate_doors(Material(key, shown, authority.certificate), peers, authority)
    with ExitStack() as stack:
        store = stack.enter_context(Store(folder / "state"))
        running = serve(options, store.results, store.blobs, doors=doors)
        stack.callback(running.stop)
        made = Scene(authority, running, store, kind)
        stack.enter_context(_honest(made, folder))
        wait_for(
            lambda: len(running.grid(RunIdentity("none", "00" * 32)).agents_here) == len(HONEST), PATIENCE_S
        )
        yield made


@contextmanager
def _honest(made: Scene, folder: Path) -> Iterator[None]:
    """The agents as they are, with a client of ours."""
    app = f"tests.server.hostile.apps:{made.kind}"
    settings = ClientSettings(server=made.running.address, data=folder)

    async def agent(name: str) -> Agent:
        material = made.device(name)

        async def renewing() -> Material:
            return material

        return Agent(settings, name, folder / name, renewing, app, InlineWorkshop())

    loop = get_grpc_event_loop()
    agents = [played(agent(name)) for name in HONEST]
    ended = [asyncio.run_coroutine_threadsafe(one.run(), loop) for one in agents]
    try:
        yield
    finally:
        for one in agents:
            loop.call_soon_threadsafe(one.stop)
        for end in ended:
            end.result(PATIENCE_S)


def expected(rounds: int = 2) -> Arrays:
    """Where plain runs of the honest three end, by the definition of a weighted mean."""
    state = dict(START)
    for round_ in range(1, rounds + 1):
        change = mean(round_, START)
        state = {name: (array + change[name]).astype(np.float32) for name, array in state.items()}
    return freeze_arrays(state)


def counted(running: RunningServer, name: str) -> Mapping[str, int]:
    """What was refused of a caller so far, by reason; the empty name is that of callers without one."""
    return running.refusals.of(name)
