"""Running one client function where no Flower runtime is: in our own grids' workers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedpeft.errors import FedPEFTError
from fedpeft.transport.client_state_arrays import MEMORY, REPLICA, arrays_in, record_of
from fedpeft.transport.disclosure import Disclosure
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.record_bytes import content_bytes, content_of
from fedpeft.wire.failures import to_text

# In a node's configuration: the digest of the only run that messages may be of, and the round.
RUN, ROUND = "run", "round"
_NODE_ID = 2  # of an agent, to itself; the server routes by connection


@dataclass(frozen=True)
class Outcome:
    """What a client function left.

    Attributes:
        content: the reply as `content_bytes`; empty where it failed.
        error: "<class>: <reason>" where it failed, else empty.
        memory: what the client remembers from now on; a failed task leaves it as it was.
        replica: the global state that the client holds from now on, where later ones come as steps from it.
    """

    content: bytes
    error: str = ""
    memory: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    replica: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A message for a client function.

    Attributes:
        kind: the message's type, "train" or "query.hello".
        group: the round, as text.
        node: who is asked.
        config: what the node knows of itself.
    """

    content: RecordDict
    kind: str
    group: str
    node: int
    config: UserConfig

    def answer(self, app: ClientApp, state: RecordDict) -> RecordDict | str:
        """The reply's content, or "<class>: <reason>" of whatever went wrong.

        Args:
            state: what the client remembers; changed in place, also by a function that fails half-way.
        """
        ensure_identity()
        context = Context(run_id=1, node_id=self.node, node_config=self.config, state=state, run_config={})
        try:
            message = Message(self.content, self.node, self.kind, group_id=self.group)
            reply = app(message, context)
        except Exception as error:  # whatever a client does, its round and its agent go on
            return to_text(error)
        if reply.has_error():
            return reply.error.reason or "FederationError: no reason given"
        return reply.content


def execute(
    app: ClientApp,
    kind: str,
    group: str,
    content: bytes,
    memory: Mapping[str, NDArray[Any]],
    *,
    client: str,
    run: str = "",
    disclosure: Disclosure = Disclosure(),  # noqa: B008 - frozen
    replica: Mapping[str, NDArray[Any]] | None = None,
) -> Outcome:
    """Call the client function of `app` for a message; whatever goes wrong in it is part of the outcome.

    Args:
        kind: the message's type, "train" or "query.hello".
        group: the round, as text.
        content: the message's content, see `content_bytes`.
        memory: what the client remembers.
        client: its name in the run.
        run: digest of the run that was let in, for the app of agents.
        disclosure: which numbers beside an update may leave.
        replica: the global state that it holds, unless this process has held it since.
    """
    held = {MEMORY: memory, REPLICA: replica}
    state = RecordDict({name: record_of(arrays) for name, arrays in held.items() if arrays})
    config: UserConfig = {"client": client, RUN: run, ROUND: group, **disclosure.to_config()}
    try:
        call = Call(content_of(content, who="the server"), kind, group, _NODE_ID, config)
        reply = call.answer(app, state)
        if isinstance(reply, str):
            return Outcome(b"", reply, memory)
        return Outcome(content_bytes(reply), "", arrays_in(state, MEMORY), arrays_in(state, REPLICA))
    except FedPEFTError as error:  # a content that is none, or none that can be sent
        return Outcome(b"", to_text(error), memory)


@functools.cache
def load_app(name: str) -> ClientApp:
    """The app that ``module:attribute`` names.

    Raises:
        TypeError: that is something else.
    """
    module, _, attribute = name.partition(":")
    app = getattr(importlib.import_module(module), attribute)
    if not isinstance(app, ClientApp):
        raise TypeError(f"{name} is {type(app).__name__}, a ClientApp is needed")
    return app
