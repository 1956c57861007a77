"""The `ClientApp` of agents that share a process with a simulation of their run: in benchmarks and tests.

Agents know a run by what they are told of it, the simulation by its run file. Nothing is loaded here.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.config.device_task import device_task
from fedpeft.errors import FederationError
from fedpeft.flower.client_work import greet, send_update, use_one_thread
from fedpeft.participant.loaded_run import LoadedRun, list_loaded_runs
from fedpeft.transport.tasks import Task

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """See `greet`."""
    return greet(message, context, _find)


@app.train()
def train(message: Message, context: Context) -> Message:
    """See `send_update`."""
    return send_update(message, context, _find)


def _find(task: Task, _: Context) -> LoadedRun:
    use_one_thread()
    for resident in list_loaded_runs():
        if device_task(resident.run).digest == task.run_digest:
            return resident
    raise FederationError(f"no simulation of run {task.run_digest[:12]} is loaded in this process")
