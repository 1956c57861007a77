"""Client apps over seed-scalars: honest ones, and one per way of sending bad integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.errors import TrainingError
from fedpeft.spaces.seed_scalars import LARGEST
from fedpeft.transport.tasks import Hello, error_reply, hello_reply, read_task, update_reply
from fedpeft.wire.codec import Envelope, decode, encode
from fedpeft.wire.state_message import decode_state

SEEDS = 6
SENT = [3, 0, -2, 0, 0, 40]
Answer = Callable[[Envelope, Message], Message]


def envelope_for(message: Message, client: str) -> Envelope:
    """What an honest client sends: `SENT`, weight 2."""
    task = read_task(message)
    state = decode(decode_state(task.state, who="state").whole, who="state")
    return Envelope(
        {"amounts": np.array(SENT, dtype=np.int64)},
        task.run_digest,
        task.round,
        state.state_digest,
        state.space,
        client=client,
        weight=2,
        metrics={"loss": 0.5, "steps": 3.0, "examples": 24.0},
        base_digest=state.base_digest,
        stages=(("weigh", "{}"),),
    )


def sends(*amounts: int) -> Answer:
    values = np.array(amounts, dtype=np.int64)
    return lambda e, m: update_reply(encode(replace(e, arrays={"amounts": values})), m)


def named(name: str) -> Answer:
    return lambda e, m: update_reply(encode(replace(e, arrays={name: e.arrays["amounts"]})), m)


def floats(e: Envelope, m: Message) -> Message:
    arrays = {"amounts": np.full(SEEDS, np.nan, dtype=np.float32)}
    return update_reply(encode(replace(e, arrays=arrays)), m)


MISBEHAVIOUR: dict[str, tuple[Answer, str, str]] = {  # answer, status, words of the reason
    "too_large": (sends(0, LARGEST + 1, 0, 0, 0, 0), "refused", "agreed range"),
    "far_too_large": (sends(0, 0, -(2**62), 0, 0, 0), "refused", "agreed range"),
    "beyond_the_code": (sends(0, 0, -(2**63), 0, 0, 0), "refused", "agreed range"),
    "too_many_seeds": (sends(*SENT, 1), "refused", "not part of this run"),
    "too_few_seeds": (sends(*SENT[:-1]), "refused", "not part of this run"),
    "unknown_array": (named("scalars"), "refused", "payload"),
    "floats": (floats, "refused", "float32"),
    "truncated": (lambda e, m: update_reply(encode(e)[:-7], m), "refused", "client-1"),
    "other_round": (lambda e, m: update_reply(encode(replace(e, round=e.round + 1)), m), "refused", "round"),
    "other_state": (
        lambda e, m: update_reply(encode(replace(e, state_digest="0" * 64)), m),
        "refused",
        "state",
    ),
    "diverged": (lambda e, m: error_reply(TrainingError("the losses are nan"), m), "failed", "nan"),
}


def make_app(answers: dict[int, Answer]) -> ClientApp:
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return hello_reply(Hello(f"client-{_number(context)}", 10, "ba5e" * 16), message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = _number(context)
        answer = answers.get(number, sends(*SENT))
        return answer(envelope_for(message, f"client-{number}"), message)

    return app


def _number(context: Context) -> int:
    return int(context.node_config["partition-id"])


VARIED = [[9, 0, -2, 400, 1, 40], [3, 7, -2, -9, 0, 41], [2, 7, -5, -8, 0, 42], [-700, 8, 6, -7, 0, 44]]

honest = make_app({})
varied = make_app({number: sends(*amounts) for number, amounts in enumerate(VARIED)})
greedy = make_app({1: sends(0, 0, 1000, 0, 0, 0)})
for _name, (_answer, _, _) in MISBEHAVIOUR.items():
    globals()[f"with_{_name}"] = make_app({1: _answer})
