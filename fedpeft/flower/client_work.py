"""What a client does with a message, on every engine: say who it is, or train and send an update."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable

import torch
from flwr.app import Context, Message

from fedpeft.config.run_plugins import plugins_of, plugins_text
from fedpeft.config.sections import LocalPrivacy, RecordLevelPrivacy
from fedpeft.data.tables import ClientRows
from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.rounds.downlink.exact_steps import steps_of
from fedpeft.rounds.downlink.replica import WHO, Replica, catch_up
from fedpeft.spaces import Memory
from fedpeft.stages import StageContext, on_client
from fedpeft.transport.client_state_arrays import MEMORY, REPLICA, arrays_in, record_of
from fedpeft.transport.disclosure import Disclosure
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.tasks import Hello, Task, error_reply, hello_reply, read_task, update_reply
from fedpeft.updates.update import Arrays, arrays_digest, freeze_arrays
from fedpeft.wire.codec import Envelope, decode, encode
from fedpeft.wire.state_message import decode_state

_MOST_REPLICAS = 8
_STATES: deque[tuple[bytes, str, str, tuple[Arrays, str]]] = deque(maxlen=8)  # a cache of the latest ones
_REPLICAS: dict[tuple[str, str], Replica] = {}  # a cache by run and client, for grids that keep no record


Find = Callable[[Task, Context], LoadedRun]
"""Finds the run of a task, loaded; raises a `FedPEFTError` where it can't be had."""


def greet(message: Message, context: Context, find: Find) -> Message:
    """Say who this client is and what it holds."""
    ensure_identity()
    try:
        resident = find(read_task(message), context)
        client = resident.data.clients[_partition(context, resident)]
        resident = resident.of_client(client.name)
        rows = Disclosure.of_node(context.node_config).count(_rows_to_report(resident, client))
        plugins = plugins_text(plugins_of(resident.run))
        return hello_reply(Hello(client.name, rows, resident.base_digest, plugins), message)
    except FedPEFTError as error:
        return error_reply(error, message)


def send_update(message: Message, context: Context, find: Find) -> Message:
    """Train on this client's rows, run the stages, and send the update."""
    ensure_identity()
    try:
        task = read_task(message)
        resident = find(task, context)
        index = _partition(context, resident)
        resident = resident.of_client(resident.data.clients[index].name)
        return update_reply(_train(task, resident, index, context), message)
    except FedPEFTError as error:
        return error_reply(error, message)


def use_one_thread() -> None:
    """Let torch compute on one thread: more would change the last bits of what is computed."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def _rows_to_report(resident: LoadedRun, client: ClientRows) -> int:
    """The client's number of rows; 0 where privacy hides it from the server."""
    hidden = isinstance(resident.run.privacy, RecordLevelPrivacy | LocalPrivacy)
    return 0 if hidden else len(client.train)


def _train(task: Task, resident: LoadedRun, index: int, context: Context) -> bytes:
    state, digest = _current_state(task, resident, index, context)
    memory = arrays_in(context.state, MEMORY)
    update, _ = resident.train_client(index, task.round, state, proximal_mu=task.proximal_mu, memory=memory)
    name = resident.data.clients[index].name
    stage_context = StageContext(
        seed=resident.run.run.seed,
        round=task.round,
        client=name,
        memory=memory,
        held_out_loss=_make_held_out_loss(resident, index, state, memory),
    )
    update = on_client(resident.stages, update, stage_context)
    rows, steps = len(resident.data.clients[index].train), resident.run.of_client(name).training.steps
    counts = ("examples",) if steps is not None else ("examples", "steps")
    metrics = Disclosure.of_node(context.node_config).select(update.metrics, counts, rows)
    if stage_context.memory:
        context.state[MEMORY] = record_of(stage_context.memory)
    return encode(
        Envelope(
            arrays=update.arrays,
            run_digest=task.run_digest,
            round=task.round,
            state_digest=digest,
            space=resident.space.kind,
            client=name,
            weight=update.weight,
            metrics=metrics,
            encoded=update.encoded,
            base_digest=resident.base_digest,
            stages=resident.stage_list,
        )
    )


def _partition(context: Context, resident: LoadedRun) -> int:
    """Which client this node is: `client` by name or `partition-id` by number in the node's configuration."""
    name = context.node_config.get("client")
    if name is not None:
        return resident.client_index(str(name))
    index, count = int(context.node_config.get("partition-id", -1)), len(resident.data.clients)
    if not 0 <= index < count:
        raise FederationError(
            f"this node has partition-id {index} and the run has {count} clients, numbered from 0"
        )
    return index


def _make_held_out_loss(
    resident: LoadedRun, index: int, state: Arrays, memory: Memory
) -> Callable[[Arrays], float] | None:
    """How stages may ask the client's held-out rows; None where it has none."""
    if not len(resident.data.clients[index].heldout):
        return None
    return functools.partial(resident.compute_held_out_loss, index, state, memory=memory)


def _current_state(task: Task, resident: LoadedRun, index: int, context: Context) -> tuple[Arrays, str]:
    """The round's state and its fingerprint; where states travel in steps, from the one that is held here."""
    steps = steps_of(resident.run, task.run_digest, resident.space)
    if steps is None:
        return _state(task.state, task.run_digest, resident.base_digest)
    message = decode_state(task.state, who=WHO)
    if message.whole and not message.keep:
        return _state(message.whole, task.run_digest, resident.base_digest)
    holder = (task.run_digest, resident.data.clients[index].name)
    replica = catch_up(message, _replica(context) or _REPLICAS.get(holder), steps)
    context.state[REPLICA] = record_of(replica.arrays)
    _hold(holder, replica)
    return replica.arrays, replica.digest


def _hold(holder: tuple[str, str], replica: Replica) -> None:
    _REPLICAS.pop(holder, None)
    _REPLICAS[holder] = replica
    while len(_REPLICAS) > _MOST_REPLICAS:
        del _REPLICAS[next(iter(_REPLICAS))]


def _replica(context: Context) -> Replica | None:
    kept = arrays_in(context.state, REPLICA)
    if not kept:
        return None
    arrays = freeze_arrays(kept)
    return Replica(arrays_digest(arrays), arrays)


def _state(payload: bytes, run_digest: str, base_digest: str) -> tuple[Arrays, str]:
    """A round's state, checked: once per process and round, not once per client."""
    for known, run, base, state in _STATES:  # no table by hash: to hash a payload is to read it all
        if (run, base) == (run_digest, base_digest) and (known is payload or known == payload):
            return state
    state = _decode_state(payload, run_digest, base_digest)
    _STATES.append((payload, run_digest, base_digest, state))
    return state


def _decode_state(payload: bytes, run_digest: str, base_digest: str) -> tuple[Arrays, str]:
    """Decode a state and compare its fingerprint with the one that was announced."""
    envelope = decode(payload, who=WHO)
    digest = arrays_digest(envelope.arrays)
    if digest != envelope.state_digest or envelope.run_digest != run_digest:
        raise FederationError(
            f"the state that came has fingerprint {digest[:12]}, announced was {envelope.state_digest[:12]};"
            " nothing was trained"
        )
    if envelope.base_digest and envelope.base_digest != base_digest:
        raise FederationError(
            f"the base model here has digest {base_digest[:12]}, the run's has {envelope.base_digest[:12]}:"
            " other files, another quantisation or another version of its library; nothing was trained"
        )
    return envelope.arrays, digest
