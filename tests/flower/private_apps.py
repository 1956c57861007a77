"""Client apps for private rounds: they answer with the stages that the task's run file asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.config.run_file import run_from_json
from fedpeft.errors import TrainingError
from fedpeft.stages import build_stages, stage_list
from fedpeft.transport.tasks import Hello, error_reply, hello_reply, read_task, update_reply
from fedpeft.wire.codec import encode
from tests.flower.apps import envelope_for

Value = Callable[[int], float | None]  # what client number i puts into every entry; None: it fails


def make_app(value: Value) -> ClientApp:
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return hello_reply(Hello(f"client-{_number(context):03d}", 1, "ba5e" * 16), message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = _number(context)
        sent = value(number)
        if sent is None:
            return error_reply(TrainingError("the training loss is nan"), message)
        envelope = envelope_for(message, f"client-{number:03d}", sent)
        stages = stage_list(build_stages(run_from_json(read_task(message).run_json)))
        return update_reply(encode(replace(envelope, weight=1, stages=stages)), message)

    return app


def _number(context: Context) -> int:
    return int(context.node_config["partition-id"])


zeros = make_app(lambda number: 0.0)
ones = make_app(lambda number: 1.0)
poisoned = make_app(lambda number: float("nan") if number % 2 else 0.0)
failing = make_app(lambda number: None)
canary_in = make_app(lambda number: 1.0 if number == 0 else 0.0)
canary_out = make_app(lambda number: 0.0)
