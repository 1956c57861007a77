"""The `ClientApp` of agents: it works with the run that the agent's owner let in, and loads nothing.

The agent checks a task and loads its run before a message gets here, and says in the node's configuration
which run that is. A message of any other run is refused: what was checked is what is used.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.errors import FederationError
from fedpeft.flower.client_work import greet, send_update, use_one_thread
from fedpeft.flower.execute import ROUND, RUN
from fedpeft.participant.loaded_run import LoadedRun, get_loaded_run
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


def _find(task: Task, context: Context) -> LoadedRun:
    """The run that was let in.

    Raises:
        FederationError: the message is of another one.
    """
    use_one_thread()
    digest = str(context.node_config.get(RUN, ""))
    if task.run_digest != digest or str(task.round) != context.node_config.get(ROUND):
        raise FederationError(
            f"a message of round {task.round} of run {task.run_digest[:12]} came, let in was round"
            f" {context.node_config.get(ROUND)} of run {digest[:12]}; nothing was trained"
        )
    return get_loaded_run(digest)
