"""Orders carried out in the agent's own process: for many light agents in one, in benchmarks and tests."""

from __future__ import annotations

import asyncio

from fedpeft.runtime.frames import Frame
from fedpeft_client.workers.worker import execute_order


class InlineWorkshop:
    """A `Worker` without a process; a crash of the client's function is a crash of the agent."""

    async def do(self, order: Frame) -> Frame:
        """On a thread, so that the connection lives on."""
        return await asyncio.to_thread(execute_order, order)

    async def interrupt(self) -> None:
        """Nothing: what is under way goes on to its end, as other agents work in this process too."""

    async def release(self) -> None:
        """Nothing is held that is not the process's."""

    async def close(self) -> None:
        """Nothing to end."""
