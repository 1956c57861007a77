"""What honest agents of the hostile suite answer: small known numbers, and all that must come with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedpeft.config.run_file import build_run
from fedpeft.stages import StageContext, build_stages, on_client, stage_list
from fedpeft.transport.tasks import Hello, Task, hello_reply, read_task, update_reply
from fedpeft.updates.update import Update
from fedpeft.wire.codec import Envelope, decode, encode

BASE = "ba5e" * 16
WEIGHTS = {"ada": 1, "bob": 1, "cyd": 2}  # a power of two in all, so that the mean is exact
TABLES: dict[str, dict[str, Any]] = {
    "plain": {"run": {"name": "plain", "rounds": 2}},
    "ternary": {"run": {"name": "ternary", "rounds": 2}, "stages": [{"kind": "ternary", "density": 0.2}]},
}
RUNS = {kind: build_run(tables, source="test") for kind, tables in TABLES.items()}


def sent(client: str, round_: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What a client moves the state by: sixteenths, different in every entry."""
    first = 1 + round_ + 8 * sorted(WEIGHTS).index(client)
    entries = np.arange(first, first + int(np.prod(shape))) % 64
    return (entries / 16).reshape(shape).astype(np.float32)


def envelope_for(task: Task, client: str, kind: str, like: str = "") -> Envelope:
    """The honest answer to a task.

    Args:
        kind: of the run, as in `RUNS`.
        like: whose numbers are sent; the client's own if empty.
    """
    stages = build_stages(RUNS[kind])
    state = decode(task.state, who="state")
    arrays = {name: sent(like or client, task.round, array.shape) for name, array in state.arrays.items()}
    weight = WEIGHTS[like or client]
    update = on_client(stages, Update(arrays, weight, {"loss": 0.5}), StageContext(0, task.round, client))
    return Envelope(
        update.arrays,
        task.run_digest,
        task.round,
        state.state_digest,
        state.space,
        client=client,
        weight=update.weight,
        metrics=dict(update.metrics),
        encoded=update.encoded,
        base_digest=state.base_digest,
        stages=stage_list(stages),
    )


def mean(round_: int, start: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """What a round of the honest three moves the state by, by the definition of a weighted mean."""
    total = sum(WEIGHTS.values())
    moved = {}
    for name, array in start.items():
        sums = np.zeros(array.shape)
        for client, weight in WEIGHTS.items():
            sums += weight * sent(client, round_, array.shape)
        moved[name] = (sums / total).astype(np.float32)
    return moved


def make_app(kind: str) -> ClientApp:
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return hello_reply(Hello(str(context.node_config["client"]), 10, BASE), message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = str(context.node_config["client"])
        return update_reply(encode(envelope_for(read_task(message), client, kind)), message)

    return app


plain, ternary = make_app("plain"), make_app("ternary")
