"""The process's one event loop for gRPC."""

from __future__ import annotations

import asyncio
import functools
import threading


@functools.cache
def get_grpc_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop that runs on a thread of its own until the process ends.

    One for all: gRPC's asyncio layer has one queue of events per process, and loops on several threads take
    each other's events from it now and then, which leaves calls waiting for ever.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fedpeft-transport", daemon=True).start()
    return loop
