"""The server's part of a run on any grid, and the `ServerApp` that holds it on Flower's SuperLink."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Error, Message
from flwr.serverapp import Grid, ServerApp

from fedpeft.config.client_groups import own_base_of, refuse_unknown
from fedpeft.config.run_file import run_json
from fedpeft.config.run_identity import identity_digest
from fedpeft.config.run_plugins import plugins_of, plugins_text
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FederationError, FedPEFTError, UsageError
from fedpeft.ledger import Checkpoint
from fedpeft.ledger.records import Evaluation
from fedpeft.rounds.private_rounds import BudgetStore
from fedpeft.rounds.round_context import ClientMemory, History, Journal, Observer, RoundContext
from fedpeft.rounds.round_loop import initial_checkpoint, run_rounds
from fedpeft.spaces import ServerSpace
from fedpeft.stages import Stage, build_downlink
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.transport.roster import Roster, roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import Arrays

RUN_FILE_KEY, OUT_KEY = "fedpeft.run-file", "fedpeft.out"  # in the app's configuration


class RunView(Protocol):
    """What whoever holds a run's rounds knows of it, with its model in this process or elsewhere."""

    @property
    def run(self) -> RunConfig:
        """The run."""
        ...

    @property
    def run_digest(self) -> str:
        """Of its run file."""
        ...

    @property
    def space(self) -> ServerSpace:
        """How its changes are expressed."""
        ...

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What happens to them on the way."""
        ...

    @property
    def start(self) -> Arrays:
        """Parameters that clients keep to themselves, as they are before a client's first round."""
        ...

    @property
    def start_bytes(self) -> bytes:
        """What spares devices to compute the model's start; empty where there is nothing to compute."""
        ...

    @property
    def clients_here(self) -> int:
        """Clients whose rows are here."""
        ...

    def initial_state(self) -> Arrays:
        """The state that the run starts from."""
        ...

    def base_of(self, client: str) -> str | None:
        """The fingerprint of all that is frozen in a client's model; None: that model is not loaded here."""
        ...

    def get_frozen_factors(self) -> Arrays:
        """LoRA's A where it doesn't train, by its parameter's name; only asked where a rule needs it."""
        ...

    def own_states(self, state: Arrays, memories: Arrays, nodes: Mapping[str, int]) -> dict[str, Arrays]:
        """A state as each client has it, with what it keeps to itself.

        Args:
            memories: of all clients, ``"<node>/<array>"`` to array.
            nodes: each client's number.
        """
        ...


@dataclass(frozen=True)
class RoundServer:
    """What the server of a run has, whatever the grid.

    Attributes:
        evaluate: the global state's evaluation, in this process or its workers.
        evaluate_each: evaluation of clients that have models of their own, by their states; None: they can't
            be had here.
        step: told which set-up step begins.
        ready: told who takes part, once the roll call is over.
        budget: where a private run's ledger lies.
        history: what buffered rounds ask after a restart.
    """

    resident: RunView
    journal: Journal
    observer: Observer
    evaluate: Callable[[Arrays], Evaluation | None]
    step: Callable[[str], None]
    ready: Callable[[Roster], None]
    budget: BudgetStore | None = None
    history: History | None = None
    evaluate_each: Callable[[Mapping[str, Arrays]], Evaluation | None] | None = None


def execute_rounds(
    server: RoundServer,
    grid: Grid,
    last: Checkpoint | None,
    memory: ClientMemory | None = None,
    timeout_s: float | None = None,
    gather: Callable[[Task], Roster] | None = None,
    newcomers: Callable[[int], Roster] | None = None,
    device_task: str = "",
) -> Checkpoint:
    """Call the roll, then hold all rounds after `last` (None: from the start); the final checkpoint.

    Args:
        memory: of a grid whose clients work in this process or forks of it. Without one, other processes
            load the run from what travels with every task: what agents are told of it, else its file.
        timeout_s: how long a round waits for answers; a simulation waits for all, its deadlines are virtual.
        gather: how the roll is called; None: every client whose rows the server has must answer.
        newcomers: see `RoundContext`.
        device_task: text of `fedpeft.config.device_task.DeviceTask`, where clients are agents.

    Raises:
        FederationError: a client is missing, or holds another base model than the server.
        FedPEFTError: what `run_rounds` raises.
    """
    resident = server.resident
    text = run_json(resident.run) if memory is None and not device_task else ""
    server.step("roll call")
    # A process of our own was forked with the model.
    start_bytes = resident.start_bytes if text or device_task else b""
    digest = identity_digest(device_task) if device_task else resident.run_digest
    task = Task(digest, 0, b"", text, start=start_bytes, device_task=device_task)
    roster = gather(task) if gather is not None else _everyone(resident, grid, task)
    refuse_unknown(resident.run, roster.members)
    server.ready(roster)
    federation = RoundContext(
        run=resident.run,
        digest=resident.run_digest,
        grid=grid,
        roster=roster,
        space=resident.space,
        stages=resident.stages,
        journal=server.journal,
        observer=server.observer,
        evaluate=_evaluation(server, roster, memory),
        run_json=text,
        device_task=device_task,
        timeout_s=timeout_s,
        memory=memory,
        downlink=build_downlink(resident.run),
        budget=server.budget,
        history=server.history,
        frozen_factors=resident.get_frozen_factors() if resident.run.federation.lora_rule else {},
        newcomers=newcomers,
    )
    start = last or initial_checkpoint(federation, resident.initial_state())
    return run_rounds(federation, start)


def _evaluation(
    server: RoundServer, roster: Roster, memory: ClientMemory | None
) -> Callable[[Arrays], Evaluation | None]:
    """How a state is evaluated; where clients keep parameters to themselves, with each client's own.

    Nobody can score them where clients are elsewhere: then nothing is.
    """
    if not server.resident.start:
        return server.evaluate

    def each(state: Arrays) -> Evaluation | None:
        if memory is None or server.evaluate_each is None:
            return None
        nodes = {name: member.node_id for name, member in roster.members.items()}
        return server.evaluate_each(server.resident.own_states(state, memory.memory(), nodes))

    return each


def _everyone(resident: RunView, grid: Grid, task: Task) -> Roster:
    clients = resident.clients_here
    roster = roll_call(
        grid,
        task,
        expected=clients,
        own_base=own_base_of(resident.run),
        plugins=plugins_text(plugins_of(resident.run)),
    )
    if len(roster.members) < clients:
        raise FederationError(f"{len(roster.members)} of {clients} clients answered the roll call")
    check_base(roster, resident)
    return roster


def check_base(roster: Roster, resident: RunView) -> None:
    """Refuse clients whose base model is not the server's.

    Raises:
        FederationError: it differs.
    """
    wanted = {name: resident.base_of(name) for name in roster.names}
    if any(digest not in (None, roster.base_of(name)) for name, digest in wanted.items()):
        raise FederationError(
            "the clients hold another base model than the server; all need the same files and versions"
        )


@dataclass(frozen=True)
class Order:
    """What `flwr run` asks of the server.

    Attributes:
        run_file: path as this process sees it.
        out: the run's folder; None: as `fedpeft simulate` chooses it.
    """

    grid: Grid
    run_file: Path
    out: Path | None


def server_app(serve: Callable[[Order], object]) -> ServerApp:
    """A `ServerApp` that calls `serve` with what the app's configuration says.

    An error of ours fails the Flower run with its one line; of any other the traceback is logged.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        logging.getLogger("flwr").addFilter(_one_line)
        serve(read_order(grid, context))

    return app


def read_order(grid: Grid, context: Context) -> Order:
    """Grid and configuration of a Flower run as an order.

    Raises:
        UsageError: the configuration names no run file.
    """
    run_file, out = (str(context.run_config.get(key, "")) for key in (RUN_FILE_KEY, OUT_KEY))
    if not run_file:
        raise UsageError(
            f"{RUN_FILE_KEY} is empty; give the run file: flwr run --run-config '{RUN_FILE_KEY}=\"RUN.toml\"'"
        )
    return Order(NodeGrid(grid), Path(run_file), Path(out) if out else None)


def _one_line(record: logging.LogRecord) -> bool:
    """Log filter: an error of ours says all in its message, so Flower's log shows no traceback of it."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, FedPEFTError):
        record.msg, record.args = "%s: %s", (type(error).__name__, " ".join(str(error).split()))
        record.exc_info = record.exc_text = None
    return True


class NodeGrid(PolledGrid):
    """A grid of Flower's whose every message gets a reply from the node that it went to.

    A SuperLink answers for a node that is gone, or for a reply that got lost, in its own name, and numbers a
    message that it doesn't take `None`. Here each of them is an error reply of the node.
    """

    def __init__(self, inner: Grid) -> None:
        self._inner = inner
        self._sent: dict[str, Message] = {}  # unanswered, by message id
        self._refused: dict[str, Message] = {}  # error replies to messages that were not taken

    def get_node_ids(self) -> Iterable[int]:
        """As the inner grid."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; one id for each message, also for those that were not taken."""
        sent = list(messages)
        taken: list[str | None] = list(self._inner.push_messages(sent))
        if len(taken) != len(sent):
            raise FederationError(
                f"the SuperLink took {len(taken)} of {len(sent)} messages; its log above says why"
            )
        return [self._register(id_, message) for id_, message in zip(taken, sent, strict=True)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there."""
        asked = list(message_ids)
        replies = [self._refused.pop(id_) for id_ in asked if id_ in self._refused]
        waiting = [id_ for id_ in asked if id_ in self._sent]
        for reply in self._inner.pull_messages(waiting) if waiting else ():
            message = self._sent.pop(reply.metadata.reply_to_message_id)
            of_node = reply.metadata.src_node_id == message.metadata.dst_node_id
            replies.append(reply if of_node or not reply.has_error() else _from_node(reply.error, message))
        return replies

    def _register(self, id_: str | None, message: Message) -> str:
        if id_ is not None:
            self._sent[id_] = message
            return id_
        refused = f"refused-{message.metadata.group_id}-{message.metadata.dst_node_id}"
        error = Error(code=0, reason="the SuperLink did not take the message; the node has left")
        self._refused[refused] = Message(error, reply_to=message)
        return refused


def _from_node(error: Error, message: Message) -> Message:
    """An error as the reply of the node that `message` went to."""
    return Message(Error(code=error.code, reason=error.reason or ""), reply_to=message)
