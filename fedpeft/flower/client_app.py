"""The `ClientApp`: one for every engine."""

from __future__ import annotations

import functools
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.flower.identity import ensure_identity
from fedpeft.flower.tasks import Hello, Task, error_reply, hello_reply, read_task, update_reply
from fedpeft.resident import Resident, resident_for
from fedpeft.runfile import run_from_json
from fedpeft.stages import StageContext, on_client, stage_list
from fedpeft.update import Arrays, arrays_digest
from fedpeft.wire.codec import Envelope, decode, encode

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this client is and what it holds."""
    ensure_identity()
    try:
        task = read_task(message)
        resident = _resident(task)
        client = resident.data.clients[_partition(context, resident)]
        return hello_reply(Hello(client.name, len(client.train), resident.base_digest), message)
    except FedPEFTError as error:
        return error_reply(error, message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's rows, run the stages, and send the update."""
    ensure_identity()
    try:
        task = read_task(message)
        resident = _resident(task)
        return update_reply(_train(task, resident, _partition(context, resident), context), message)
    except FedPEFTError as error:
        return error_reply(error, message)


def _train(task: Task, resident: Resident, index: int, context: Context) -> bytes:
    state, digest = _state(task.state, task.run_digest)
    update, _ = resident.train_client(index, task.round, state, proximal_mu=task.proximal_mu)
    name = resident.data.clients[index].name
    stage_context = StageContext(
        seed=resident.run.run.seed,
        round=task.round,
        client=name,
        memory=_memory(context),
    )
    update = on_client(resident.stages, update, stage_context)
    _remember(context, dict(stage_context.memory))
    return encode(
        Envelope(
            arrays=update.arrays,
            run_digest=task.run_digest,
            round=task.round,
            state_digest=digest,
            space=resident.space.kind,
            client=name,
            weight=update.weight,
            metrics=update.metrics,
            encoded=update.encoded,
            base_digest=resident.base_digest,
            stages=stage_list(resident.stages),
        )
    )


def _resident(task: Task) -> Resident:
    torch.set_num_threads(1)  # more would change the last bits of what is computed
    return resident_for(task.run_digest, run_from_json(task.run_json) if task.run_json else None)


def _partition(context: Context, resident: Resident) -> int:
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


@functools.lru_cache(maxsize=2)
def _state(payload: bytes, run_digest: str) -> tuple[Arrays, str]:
    """Decode a round's state and check its fingerprint: once per process and round, not once per client."""
    envelope = decode(payload, who="the server's state")
    digest = arrays_digest(envelope.arrays)
    if digest != envelope.state_digest or envelope.run_digest != run_digest:
        raise FederationError(
            f"the state that came has fingerprint {digest[:12]}, announced was {envelope.state_digest[:12]};"
            " nothing was trained"
        )
    return envelope.arrays, digest


def _memory(context: Context) -> dict[str, NDArray[Any]]:
    record = context.state.array_records.get("memory")
    return {} if record is None else {name: array.numpy() for name, array in record.items()}


def _remember(context: Context, memory: dict[str, NDArray[Any]]) -> None:
    if memory:
        context.state["memory"] = ArrayRecord({name: Array(array) for name, array in memory.items()})
