"""Client apps that grids look up by name: one honest, and one per way of going wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.errors import TrainingError
from fedpeft.transport.tasks import Hello, error_reply, hello_reply, read_task, update_reply
from fedpeft.wire.codec import Envelope, decode, encode

Answer = Callable[[Envelope, Message], Message]


def envelope_for(message: Message, client: str, value: float = 1.0) -> Envelope:
    """What an honest client sends: `value` in every entry, weight 2."""
    task = read_task(message)
    state = decode(task.state, who="state")
    arrays = {name: np.full_like(array, value) for name, array in state.arrays.items()}
    metrics = {"loss": 0.5, "steps": 3.0, "examples": 24.0}
    return Envelope(
        arrays,
        task.run_digest,
        task.round,
        state.state_digest,
        state.space,
        client=client,
        weight=2,
        metrics=metrics,
        base_digest=state.base_digest,
        stages=(("weigh", "{}"),),
    )


def honest(envelope: Envelope, message: Message) -> Message:
    return update_reply(encode(envelope), message)


def renamed(envelope: Envelope, message: Message) -> Message:
    return honest(replace(envelope, arrays={f"x{name}": a for name, a in envelope.arrays.items()}), message)


def reshaped(envelope: Envelope, message: Message) -> Message:
    return honest(
        replace(envelope, arrays={n: np.append(a, a.flat[0]) for n, a in envelope.arrays.items()}), message
    )


def poisoned(envelope: Envelope, message: Message) -> Message:
    return honest(
        replace(envelope, arrays={n: a * np.float32("nan") for n, a in envelope.arrays.items()}), message
    )


def huge(envelope: Envelope, message: Message) -> Message:
    return honest(
        replace(envelope, arrays={n: a * np.float32(1e30) for n, a in envelope.arrays.items()}), message
    )


def truncated(envelope: Envelope, message: Message) -> Message:
    return update_reply(encode(envelope)[:-5], message)


def crashing(envelope: Envelope, message: Message) -> Message:
    raise ZeroDivisionError("a bug in the client")


def wordless(envelope: Envelope, message: Message) -> Message:
    return Message(RecordDict({"hi": ConfigRecord({"there": 1})}), reply_to=message)


MISBEHAVIOUR: dict[str, tuple[Answer, str]] = {
    "renamed": (renamed, "refused"),
    "reshaped": (reshaped, "refused"),
    "poisoned": (poisoned, "refused"),
    "huge": (huge, "refused"),
    "truncated": (truncated, "refused"),
    "other-run": (lambda e, m: honest(replace(e, run_digest="0" * 64), m), "refused"),
    "other-round": (lambda e, m: honest(replace(e, round=e.round + 1), m), "refused"),
    "other-client": (lambda e, m: honest(replace(e, client="client-0"), m), "refused"),
    "other-state": (lambda e, m: honest(replace(e, state_digest="0" * 64), m), "refused"),
    "other-space": (lambda e, m: honest(replace(e, space="seed-scalars"), m), "refused"),
    "weightless": (lambda e, m: honest(replace(e, weight=0), m), "refused"),
    "overweight": (lambda e, m: honest(replace(e, weight=2**40), m), "refused"),
    "more rows than it said": (lambda e, m: honest(replace(e, weight=11), m), "refused"),
    "unsound-metrics": (
        lambda e, m: honest(replace(e, metrics=dict.fromkeys(e.metrics, math.inf)), m),
        "folded",
    ),
    "untrainable": (lambda e, m: error_reply(TrainingError("the training loss is nan"), m), "failed"),
    "crashing": (crashing, "failed"),
    "wordless": (wordless, "failed"),
}


def make_app(behaviour: dict[int, str]) -> ClientApp:
    """Clients by number; those without a behaviour are honest. Each remembers how often it was asked."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return hello_reply(Hello(f"client-{_number(context)}", 10, "ba5e" * 16), message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = _number(context)
        memory = context.state.array_records.get("memory")
        asked = 0 if memory is None else int(memory["asked"].numpy()[0])
        context.state["memory"] = ArrayRecord({"asked": Array(np.array([asked + 1]))})
        answer = MISBEHAVIOUR[behaviour[number]][0] if number in behaviour else honest
        return answer(envelope_for(message, f"client-{number}"), message)

    return app


def _number(context: Context) -> int:
    return int(context.node_config["partition-id"])


all_honest = make_app({})
for _name in MISBEHAVIOUR:
    globals()[f"with_{_name.replace('-', '_')}"] = make_app({1: _name})
everyone_fails = make_app(dict.fromkeys(range(4), "untrainable"))
