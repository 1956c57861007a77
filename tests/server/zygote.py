"""Daemons by the dozen: one process that has loaded everything, and forks one daemon per line it is sent.

A line is a JSON object: ``state`` (folder), ``run`` (tables), ``crash_at`` (as FEDPEFT_CRASH_AT). The daemon
holds the run with stand-in agents to its end. The answer is the exit code, negative for a signal.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import fedpeft.planning.preflight  # noqa: F401  # what a first run brings is loaded before anything is forked
import fedpeft_server.runs.hosting  # noqa: F401
from fedpeft.config.run_file import build_run
from fedpeft.runtime.crash_points import arm
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Rules, Store
from tests.server.in_memory_grid import standins


def hold(order: dict[str, Any]) -> int:
    """One daemon's life: start, take the submission, go on with what is there, end."""
    torch.set_num_threads(1)
    arm(order["crash_at"])
    with Store(Path(order["state"])) as store:
        supervisor = Supervisor(store, standins(store, []))
        supervisor.start()
        run = build_run(order["run"], source="test")
        stored = supervisor.submit(run, Rules(), submission="one", submitter="me")
        supervisor.wait_idle(120.0)
        status = supervisor.get(stored.id)
        if status.status != "finished":
            print(status.status, status.reason, file=sys.stderr)
            return 1
    return 0


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                os._exit(hold(json.loads(line)))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(2)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
