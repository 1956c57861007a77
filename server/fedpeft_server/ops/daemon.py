"""`fedpeft server`: the store, the runs and the transport, put together and taken down in order."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from flwr.serverapp import Grid

from fedpeft.config.device_task import device_task
from fedpeft.credentials import (
    REVOKED_FILE,
    Authority,
    PeerCheck,
    expiry_warning,
    open_authority,
    read_material,
)
from fedpeft.errors import FedPEFTError, StateError, StorageError
from fedpeft.rounds.buffered.in_flight import overlap_of
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.telemetry import expose, set_up_log
from fedpeft_server.ops.authority_actions import AuthorityActions
from fedpeft_server.ops.end_watch import end_within
from fedpeft_server.ops.enrolment_records import RecordedEnrolment
from fedpeft_server.ops.expiry import ExpiryWatch
from fedpeft_server.ops.fd_limit import raise_fd_limit
from fedpeft_server.ops.malloc_arenas import limit_malloc_arenas
from fedpeft_server.ops.server_settings import ServerSettings
from fedpeft_server.runs.admin_servicer import Admin, Administration
from fedpeft_server.runs.control import Patience
from fedpeft_server.runs.model_process_pool import ModelProcessPool
from fedpeft_server.runs.risks import CRASH, Risks
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.server_metrics import ServerMetrics
from fedpeft_server.store import Store, StoredRun
from fedpeft_server.transport.grpc_grid import GrpcGrid, RunIdentity, node_id
from fedpeft_server.transport.serving import RunningServer, serve
from fedpeft_server.transport.tls import Doors, certificate_doors

LOG = logging.getLogger("fedpeft.server")
SIGHTINGS_S = 30.0  # between two notes of who is here
WATCH_S = 5.0  # between two looks whether the database is still this server's
END_S = 20.0  # after `drain_s`, for goodbyes and what cannot be cut short; then the process is killed


def run_daemon(settings: ServerSettings, *, migrate: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; the exit code.

    Whatever a kill cuts short goes on at the next start; the signals only make the end polite: commits are
    finished and agents are told. It ends within `drain_s` and `END_S` of a signal.

    Raises:
        UsageError, CredentialError: settings, keys or address cannot be used.
        StateError: another server holds the state or took the database over, or it is of another version.
        StorageError: the state cannot be written.
        FederationError: the port is taken.
    """
    limit_malloc_arenas()
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    set_up_log(settings.log.level, settings.log.format)
    if few := raise_fd_limit(settings.limits.connections):
        LOG.warning("%s", few)
    with (
        end_within(settings.drain_s + END_S, settings.state / CRASH),
        standing(settings, migrate=migrate) as (store, supervisor, running),
    ):
        supervisor.start()
        Risks(settings.state).trace_crashes()
        LOG.info("listening on %s, state in %s", running.address, settings.state)
        _until(told, store, running, AuthorityActions(settings.tls.authority, store.audit))
        LOG.info("ending: runs are put aside, they go on at the next start")
        if store.database.reason_of_loss:
            supervisor.drain(WATCH_S)
            raise StateError(store.database.reason_of_loss)
        if not supervisor.drain(settings.drain_s):
            LOG.warning(
                "a run did not reach a safe point in %g s; it goes on from its last commit", settings.drain_s
            )
        crash_point("server.daemon.drained")
    return 0


@contextmanager
def standing(
    settings: ServerSettings, *, migrate: bool = False
) -> Iterator[tuple[Store, Supervisor, RunningServer]]:
    """A server that listens, and is taken down when the block ends; its runs wait for `Supervisor.start`.

    Raises:
        FedPEFTError: as `run_daemon`.
    """
    doors, authority = doors_of(settings)
    metrics = ServerMetrics()
    with ExitStack() as stack:
        if settings.metrics.address:
            address, end = expose(metrics.registry, settings.metrics.address)
            stack.callback(end)
            LOG.info("metrics on http://%s/metrics", address)
        store = stack.enter_context(
            Store(settings.state, url=settings.database or None, migrate=migrate, metrics=metrics)
        )
        store.collect()
        crash_point("server.daemon.opened")
        if doors.enrol is not None:
            doors = replace(doors, enrol=RecordedEnrolment(doors.enrol, store.audit))
        line = _Line()
        supervisor = Supervisor(
            store,
            line.open_grid,
            parallel=settings.parallel_runs,
            patience=Patience(settings.limits.round_s, settings.limits.away_s),
            models=stack.enter_context(closing(_model_room(settings))) if settings.model_s else None,
            quota=settings.quota(),
            roots=settings.submitter_roots(),
        )
        admin = Admin(Administration(store, supervisor, doors.gate, authority, line.server))
        line.running = running = serve(
            settings.transport(),
            store.results,
            store.blobs,
            doors=doors,
            admin=admin,
            trouble=supervisor.trouble,
            metrics=metrics,
        )
        stack.callback(running.stop)
        crash_point("server.daemon.listening")
        yield store, supervisor, running


def _model_room(settings: ServerSettings) -> ModelProcessPool:
    limits = settings.limits
    return ModelProcessPool(
        settings.model_s,
        task_s=limits.model_task_s,
        check_s=limits.check_s,
        variables=settings.model_environment,
    )


def doors_of(settings: ServerSettings) -> tuple[Doors, Authority | None]:
    """Who is let in, by the settings' certificates; everyone on this machine where it is insecure.

    Raises:
        CredentialError: a key or certificate cannot be used.
    """
    if settings.tls.keys is None:
        return Doors(), None
    now = datetime.now(UTC)
    material = read_material(settings.tls.keys, now)
    warning = expiry_warning(material.certificate, now, "the server")
    if warning:
        LOG.warning("%s", warning)
    authority = None if settings.tls.authority is None else open_authority(settings.tls.authority)
    revoked = settings.tls.keys / REVOKED_FILE if authority is None else authority.revoked_file
    peers = PeerCheck(material.authority, revoked)
    return certificate_doors(material, peers, authority, keys=settings.tls.keys), authority


class _Line:
    """The transport, which needs the admin service before it listens, and which that service needs."""

    running: RunningServer | None = None

    def server(self) -> RunningServer:
        if self.running is None:
            raise StorageError("the server is starting; ask again in a moment")
        return self.running

    @contextmanager
    def open_grid(self, stored: StoredRun) -> Iterator[_Agents]:
        """A run's grid; its agents' work is withdrawn when the run lets go of it."""
        agents = stored.rules.agents or None
        identity = RunIdentity(stored.id, device_task(stored.run).digest, overlap_of(stored.run))
        grid = self.server().grid(identity, agents=agents)
        greeter = self.server().grid(identity, agents=agents, wait_s=0.0)
        try:
            yield _Agents(grid, greeter)
        finally:
            for one in (grid, greeter):
                one.stop(FedPEFTError("the run was left"))


@dataclass(frozen=True)
class _Agents:
    """A `GrpcGrid` as a run takes it."""

    inner: GrpcGrid
    greeter: GrpcGrid

    @property
    def grid(self) -> Grid:
        return self.inner

    def here(self) -> Mapping[str, int]:
        names = self.greeter.agents_here
        self.greeter.know(names)
        return {name: node_id(name) for name in names}

    def know(self, agents: Iterable[str]) -> None:
        self.inner.know(agents)

    def tell(self, agent: str, text: str) -> None:
        self.inner.tell(agent, text)

    def set_result_limit(self, result_bytes: int) -> None:
        self.inner.set_result_limit(result_bytes)

    def count_refusal(self, agent: str, why: str) -> None:
        self.inner.count_refusal(agent, why)


def _until(told: threading.Event, store: Store, running: RunningServer, actions: AuthorityActions) -> None:
    """Wait for a signal, or until the database is another server's; note now and then who is here."""
    expiry, noted = ExpiryWatch(), time.monotonic()
    actions.take_in()
    while not told.wait(WATCH_S) and not store.database.reason_of_loss:
        with contextlib.suppress(StorageError):
            store.database.watch()
        actions.take_in()
        if time.monotonic() - noted < SIGHTINGS_S:
            continue
        noted = time.monotonic()
        agents = running.agents()
        for line in expiry.lines(running.standing(), agents, datetime.now(UTC)):
            LOG.warning("%s", line)
        here = [status.name for status in agents if status.connected]
        with contextlib.suppress(StorageError):
            store.agents.record_seen(here)
