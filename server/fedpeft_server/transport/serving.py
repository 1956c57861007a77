"""The transport, running: an event loop on a thread of its own, with all that agents and people call."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedpeft.errors import FederationError, UsageError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft_server.server_metrics import ServerMetrics
from fedpeft_server.store.contracts import Acceptor, BlobStore
from fedpeft_server.transport.blob_transfer import Transfers
from fedpeft_server.transport.call_meter import Meter
from fedpeft_server.transport.federation_servicer import FederationServicer
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from fedpeft_server.transport.grpc_grid import WAIT_S, GrpcGrid, RunIdentity
from fedpeft_server.transport.grpc_options import TransportOptions, server_channel_options
from fedpeft_server.transport.rate_limits import RateLimits
from fedpeft_server.transport.refusals import NOBODY, Reason, Refusals
from fedpeft_server.transport.request_guard import RequestGuard
from fedpeft_server.transport.result_ingest import ResultIngest
from fedpeft_server.transport.sessions import AgentStatus, Hub, ServerStatus
from fedpeft_server.transport.tls import Doors

Result = TypeVar("Result")

_THREADS = 8  # for files, hashes, and the admin service's calls


def serve(
    options: TransportOptions,
    acceptor: Acceptor,
    blobs: BlobStore,
    *,
    doors: Doors | None = None,
    admin: rpc.AdminServicer | None = None,
    trouble: Callable[[str | None], None] = lambda line: None,
    metrics: ServerMetrics | None = None,
) -> RunningServer:
    """Listen, and come back once agents can connect.

    Args:
        admin: implements the service of people; its methods may be plain functions, which run on threads.
        trouble: told one line when results cannot be stored, None once they can be again; from any thread.
        metrics: counts what passes; None: for nobody.

    Raises:
        UsageError: plaintext on an address that others can reach.
        FederationError: the port is taken, or the address is none of this machine.
    """
    doors = doors or Doors()
    if doors.credentials is None and not is_loopback(options.host):
        raise UsageError(
            f"{options.host} can be reached from elsewhere and would be plaintext; provision certificates, or"
            " listen on 127.0.0.1 with --insecure"
        )
    return RunningServer(options, acceptor, blobs, doors, admin, trouble, metrics or ServerMetrics())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class RunningServer:
    """What `serve` gives: grids for runs, agents for people, an end. Any thread may call its methods.

    Attributes:
        refusals: what was refused since the start, by caller and reason.
    """

    def __init__(
        self,
        options: TransportOptions,
        acceptor: Acceptor,
        blobs: BlobStore,
        doors: Doors,
        admin: rpc.AdminServicer | None,
        trouble: Callable[[str | None], None],
        metrics: ServerMetrics,
    ) -> None:
        self._options, self._acceptor, self._blobs = options, acceptor, blobs
        self._doors, self._started = doors, time.time()
        self.refusals = Refusals()
        self._shares = RateLimits(options, self.refusals)
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="fedpeft-io")
        self._loop = get_grpc_event_loop()
        try:
            self._do(self._start(doors, admin, trouble, metrics))
        except BaseException:
            self._executor.shutdown(wait=False)
            raise

    @property
    def address(self) -> str:
        """Host and port, as agents dial it."""
        return f"{self._options.host}:{self.port}"

    def grid(
        self,
        run: RunIdentity,
        *,
        agents: Collection[str] | None = None,
        max_result_bytes: int | None = None,
        wait_s: float = WAIT_S,
    ) -> GrpcGrid:
        """A grid for one run; see `GrpcGrid`."""
        return GrpcGrid(
            run,
            self._hub,
            self._loop,
            self._acceptor,
            self._blobs,
            agents=agents,
            max_result_bytes=max_result_bytes or self._options.max_blob_bytes,
            wait_s=wait_s,
        )

    def agents(self) -> list[AgentStatus]:
        """All agents that were here since the start."""
        found: list[AgentStatus] = self._do(_call_on_loop(self._hub.status))
        return found

    def standing(self) -> ServerStatus:
        """The transport as a whole."""
        ends = self._doors.ends()
        return ServerStatus(
            started=self._started,
            certificate_ends=ends.timestamp() if ends else None,
            connected=len(self._hub.connected),
            max_agents=self._options.max_sessions,
            refused=self.refusals.totals(),
            refused_nameless=self.refusals.of(NOBODY),
        )

    def count_refusal(self, agent: str, reason: Reason, detail: str) -> None:
        """Count what was refused of an agent behind the transport, such as an update that is not finite."""
        self._loop.call_soon_threadsafe(self._shares.count, agent, reason, detail)

    def disconnect(self, agent: str, reason: str) -> None:
        """End an agent's session, such as one whose certificate was just revoked."""
        self._loop.call_soon_threadsafe(self._hub.close, reason, agent)

    def stop(self, reason: str = "the server is stopping") -> None:
        """Say goodbye, let running calls end, store what has come in."""
        self._do(self._stop(reason))
        self._intake.end()
        self._executor.shutdown(wait=True)

    async def _start(
        self,
        doors: Doors,
        admin: rpc.AdminServicer | None,
        trouble: Callable[[str | None], None],
        metrics: ServerMetrics,
    ) -> None:
        options = self._options
        self._hub = Hub(options.max_inline_bytes, self._shares)
        self._server = grpc.aio.server(
            migration_thread_pool=self._executor,
            options=server_channel_options(options),
            interceptors=[Meter(metrics)],
        )
        self.port = self._bind(doors)
        self._intake = ResultIngest(
            self._hub,
            self._acceptor,
            self._blobs,
            doors.gate,
            capacity=options.intake_bytes,
            trouble=trouble,
        )
        transfers = Transfers(self._hub, self._blobs, options, self._executor, trouble)
        service = FederationServicer(self._hub, self._intake, transfers, doors.gate, options, doors.enrol)
        services: list[tuple[str, object]] = [("Federation", service)]
        if admin is not None:
            services.append(("Admin", admin))
        front = RequestGuard(doors.gate, self._shares, options)
        described = {name: pb.DESCRIPTOR.services_by_name[name] for name, _ in services}
        handlers = [front.handlers(described[name], servicer) for name, servicer in services]
        self._server.add_generic_rpc_handlers(handlers)
        await self._add_standard_services([service.full_name for service in described.values()])
        await self._server.start()
        self._watch(metrics)

    def _watch(self, metrics: ServerMetrics) -> None:
        hub, intake = self._hub, self._intake
        metrics.watch("agents_connected", "Agents with an open session", lambda: len(hub.connected))
        metrics.watch("tasks_pending", "Tasks asked of agents and not answered yet", hub.count_pending)
        metrics.watch(
            "intake_bytes", "Bytes of results that wait to be made durable", lambda: intake.waiting_bytes
        )
        metrics.watch_refusals(self.refusals.totals)

    def _bind(self, doors: Doors) -> int:
        where = f"{self._options.host}:{self._options.port}"
        try:
            if doors.credentials is None:
                return int(self._server.add_insecure_port(where))
            return int(self._server.add_secure_port(where, doors.credentials))
        except RuntimeError as error:
            raise FederationError(
                f"{where} cannot be listened on (in use, or not of this machine); choose another port"
            ) from error

    async def _add_standard_services(self, names: list[str]) -> None:
        """Health and reflection, so that common tools can ask what is here and whether it is well."""
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection(
            (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def _stop(self, reason: str) -> None:
        await self._health.enter_graceful_shutdown()
        self._hub.close(reason)
        await asyncio.sleep(0)
        await self._server.stop(self._options.drain_s)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _call_on_loop(function: Callable[[], Result]) -> Result:
    """A plain function on the event loop, where what it reads doesn't change under it."""
    return function()
