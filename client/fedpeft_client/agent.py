"""The agent: dial, work, and dial again, for days."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

import grpc
import psutil

from fedpeft.credentials import Material
from fedpeft.errors import FedPEFTError, ValidityError
from fedpeft.runtime.files import hold_lock, make_private_folder
from fedpeft.runtime.repeats import Repeats
from fedpeft_client.agent_metrics import AgentMetrics
from fedpeft_client.client_settings import ClientSettings
from fedpeft_client.status import STATUS_FILE, AgentStatusFile
from fedpeft_client.task_executor import AgentConfig, TaskExecutor
from fedpeft_client.transport.dialing import STEADY_S, error_of, is_final, open_channel, pauses
from fedpeft_client.transport.egress import EGRESS_FILE, EgressLedger
from fedpeft_client.transport.session import Session
from fedpeft_client.workers.worker_process import CLIENT_APP, Bounds, Worker, WorkerPlace, WorkerProcess

LOG = logging.getLogger("fedpeft.client")
Renewing = Callable[[], Awaitable[Material]]
_LOCK = ".lock"


class Agent:
    """One agent of one server. Create it and `run` it in one event loop.

    Args:
        material: gives key and certificate before every attempt to connect, so that they can be renewed;
            None for plaintext.
        app: the client's functions; others than the default are for tests and benchmarks.
        workshop: where they run; None: in a process of their own.
        metrics: counts what it does; None: for nobody.
        ledger: told of all that leaves; None: the home's own.

    Raises:
        StateError: another process holds the home folder, others can read it, or its files are corrupt.
        StorageError: it cannot be written.
    """

    def __init__(
        self,
        settings: ClientSettings,
        name: str,
        home: Path,
        material: Renewing | None,
        app: str = CLIENT_APP,
        workshop: Worker | None = None,
        metrics: AgentMetrics | None = None,
        ledger: EgressLedger | None = None,
    ) -> None:
        self._settings, self._name, self._renewing = settings, name, material
        make_private_folder(home, holds="what this agent learned from its rows")
        self._lock = hold_lock(
            home / _LOCK, in_use=f"{home} is in use by another agent; end it, or give this one its own --home"
        )
        policy = settings.policy
        bounds = Bounds(policy.max_task_s, policy.max_memory_mib)
        place = WorkerPlace(home, settings.data, settings.model)
        self.workshop = workshop or WorkerProcess(
            bounds,
            download=policy.allow_download,
            needs_confinement=policy.needs_confinement,
            variables=settings.worker_environment,
            place=place,
        )
        self._ledger = ledger or EgressLedger(home / EGRESS_FILE)
        self.status = AgentStatusFile(home / STATUS_FILE, name=name, server=settings.server)
        files = {"encoding": settings.encoding, "separator": settings.separator, "quoting": settings.quoting}
        trade = AgentConfig(name, settings.data, settings.model, policy, app, settings.device, files)
        metrics = metrics or AgentMetrics()
        self._desk = TaskExecutor(trade, home, self.workshop, self.status, metrics)
        metrics.watch(self.status)
        self._stopping = asyncio.Event()
        self._link: Session | None = None
        self._repeats = Repeats()
        self._known = False  # whether this server has ever let us in

    async def run(self) -> None:
        """Work until `stop`; network and server may come and go.

        Raises:
            FedPEFTError: the first contact failed for good; see `ClientSettings.connect_s`.
        """
        work = asyncio.create_task(self._desk.work())
        dial = asyncio.create_task(self._dial())
        idle = asyncio.create_task(self._release_when_idle())
        stop = asyncio.create_task(self._stop_tasks())
        try:
            done, _ = await asyncio.wait((work, dial, stop), return_when=asyncio.FIRST_COMPLETED)
            for task in (work, dial):
                if task in done:
                    task.result()
            if self._link is not None:  # while it is still read: a cancelled read cancels the session
                await self._link.leave()
        finally:
            for task in (work, dial, idle, stop):
                task.cancel()
            await asyncio.gather(work, dial, idle, stop, return_exceptions=True)
            await self.workshop.close()
            self._ledger.close()
            self.status.now("stopped")
            os.close(self._lock)

    def stop(self) -> None:
        """End `run`; a task under way is done again at the next start."""
        self._stopping.set()

    async def _stop_tasks(self) -> None:
        await self._stopping.wait()

    async def _release_when_idle(self) -> None:
        """Give the model's memory back to a device that has not been asked for a while."""
        while self._settings.idle_release_s:
            rest = self._settings.idle_release_s - self._desk.idle_s()
            if rest <= 0:
                await self.workshop.release()
                rest = self._settings.idle_release_s
            await asyncio.sleep(rest)

    async def _dial(self) -> None:
        began, waits = time.monotonic(), pauses(random.Random())
        while True:
            self.status.now("connecting")
            met = time.monotonic()
            error = await self._session()
            if time.monotonic() - met > STEADY_S:
                waits = pauses(random.Random())
            if error is not None:
                self.status.record_failure(str(error))
                if self._repeats.due(str(error)):
                    LOG.warning("%s", error)
                late = self._settings.connect_s and time.monotonic() - began > self._settings.connect_s
                waits_for_clock = isinstance(error, ValidityError)
                if not self._known and (is_final(error) or late) and not waits_for_clock:
                    raise error
            await asyncio.sleep(next(waits))

    async def _session(self) -> FedPEFTError | None:
        """One connection from dialling to its end; why it ended, if not in peace."""
        try:
            material = await self._renewing() if self._renewing is not None else None
        except FedPEFTError as error:
            return error
        if material is not None:
            self.status.certificate_ends = material.certificate.not_valid_after_utc.timestamp()
        dial = functools.partial(open_channel, self._settings.server, material)
        channel = dial()
        link: Session | None = None
        try:
            told = capabilities(self._settings.policy.capabilities)
            link = await Session.open(channel, self._name, told, dial, self._ledger)
            facts = {"event": "connected", "agent": link.welcome.name, "session": link.welcome.session}
            LOG.info("connected to %s as %s", self._settings.server, link.welcome.name, extra=facts)
            self._known, self._link = True, link
            self._repeats.clear()
            self._desk.set_session(link, material)
            self.status.now("connected")
            async for message in link.messages():
                await self._desk.handle(message)
        except (FedPEFTError, grpc.aio.AioRpcError, OSError) as error:
            return error_of(error, self._settings.server)
        finally:
            self._link = None
            self._desk.set_session(None)
            if link is not None:
                link.close()
            await channel.close()
        return None


def capabilities(told: Collection[str]) -> Mapping[str, str]:
    """What this device can do, as far as its owner tells: for people who look at the server's agents."""
    found = {
        "cores": str(os.cpu_count() or 1),
        "memory-mib": str(psutil.virtual_memory().total >> 20),
    }
    return {name: value for name, value in found.items() if name in told}
