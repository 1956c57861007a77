"""Client apps of buffered rounds: every client pulls the state halfway to a point of its own."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.errors import TrainingError
from fedpeft.transport.tasks import Hello, error_reply, hello_reply, read_task, update_reply
from fedpeft.wire.codec import Envelope, decode, encode

BASE = "ba5e" * 16
EXAMPLES = 8


def point(number: int) -> float:
    """Where a client pulls to."""
    return float(10 * number + 1)


def weight(number: int) -> int:
    """How much it counts."""
    return 1 + number % 3


def name_of(context: Context) -> str:
    """Simulated clients have numbers, agents have names."""
    config: Any = context.node_config
    return str(config["client"]) if "client" in config else f"client-{int(config['partition-id'])}"


def make_app(
    pauses: dict[str, float] | None = None,
    failing: frozenset[str] = frozenset(),
    garbled: frozenset[str] = frozenset(),
) -> ClientApp:
    """`pauses` are real seconds by client; those in `failing` never succeed, `garbled` send no update."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return hello_reply(Hello(name_of(context), EXAMPLES, BASE), message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name, task = name_of(context), read_task(message)
        time.sleep((pauses or {}).get(name, 0.0))
        if name in failing:
            return error_reply(TrainingError("the training loss is nan"), message)
        if name in garbled:
            return update_reply(b"no update", message)
        state, number = decode(task.state, who="state"), int(name.rpartition("-")[2])
        envelope = Envelope(
            {key: (np.float32(point(number)) - array) / np.float32(2) for key, array in state.arrays.items()},
            task.run_digest,
            task.round,
            state.state_digest,
            state.space,
            client=name,
            weight=weight(number),
            metrics={"loss": 0.5, "steps": 1.0, "examples": float(EXAMPLES)},
            base_digest=state.base_digest,
            stages=(("weigh", "{}"),),
        )
        return update_reply(encode(envelope), message)

    return app


honest = make_app()
one_fails = make_app(failing=frozenset({"client-1"}))
all_fail = make_app(failing=frozenset(f"client-{number}" for number in range(9)))
three_quick = make_app({"client-3": 1.5, "client-4": 1.5})
two_quick = make_app({f"client-{number}": 1.5 for number in range(3)})
one_garbled = make_app({"client-4": 1.5}, garbled=frozenset({"client-0"}))
one_sleeps = make_app({"client-5": 4.0})
unequal = make_app({f"client-{number}": 0.02 * number * number for number in range(9)})
