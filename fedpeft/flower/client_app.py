"""The `ClientApp` of engines whose processes read the run's own files: simulations, and Flower's nodes.

Where a run is not loaded yet, it is loaded as its run file says, from whatever files that names. An agent has
an app of its own, `fedpeft.flower.device_app`, which cannot do that.

A simulation's errors are told with their text, as one owner has all rows. Flower's runtime sends what it is
given: errors of `node_app` are codes, and their text is in the log of the node's process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.attacks import refuse_attack
from fedpeft.config.run_file import run_from_json
from fedpeft.errors import FedPEFTError
from fedpeft.flower.client_work import greet, send_update, use_one_thread
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun, get_loaded_run, has_loaded_run, set_loaded_run
from fedpeft.privacy.noise_sources import refuse_seeded
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.tasks import Task, client_error, error_reply, read_task
from fedpeft.wire.failures import to_text, without_text

LOG = logging.getLogger("fedpeft.client")

app = ClientApp()
node_app = ClientApp()  # on Flower's nodes, where noise must be a secret


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """See `greet`."""
    return greet(message, context, _find)


@app.train()
def train(message: Message, context: Context) -> Message:
    """See `send_update`."""
    return send_update(message, context, _find)


@node_app.query("hello")
def node_hello(message: Message, context: Context) -> Message:
    """As `hello`, unless the run's noise comes from its seed; errors leave as codes."""
    return _with_code_alone(hello, message, context)


@node_app.train()
def node_train(message: Message, context: Context) -> Message:
    """As `train`, unless the run's noise comes from its seed; errors leave as codes."""
    return _with_code_alone(train, message, context)


def _with_code_alone(
    function: Callable[[Message, Context], Message], message: Message, context: Context
) -> Message:
    """A function's reply; the text of what goes wrong is logged here, and only its code is in the reply."""
    try:
        reply = _refusal(message) or function(message, context)
        if not reply.has_error():
            return reply
        error: Exception = client_error(reply.error)
    except Exception as unexpected:  # the runtime would send its text as well
        error = unexpected
    LOG.error("%s failed: %s", message.metadata.message_type, to_text(error))
    return error_reply(without_text(error), message)


def _find(task: Task, _: Context) -> LoadedRun:
    """The task's run; loaded now if its run file came along and it isn't."""
    use_one_thread()
    if not has_loaded_run(task.run_digest) and task.run_json:
        set_loaded_run(load_simulated_run(run_from_json(task.run_json), start_bytes=task.start))
    return get_loaded_run(task.run_digest)


def _refusal(message: Message) -> Message | None:
    """A node's own answer to a run that only a simulation may hold, whatever its server thinks."""
    ensure_identity()
    try:
        task = read_task(message)
        run = run_from_json(task.run_json) if task.run_json else get_loaded_run(task.run_digest).run
        refuse_seeded(run)
        refuse_attack(run)
    except FedPEFTError as error:
        return error_reply(error, message)
    return None
