"""Client apps for agents of tests; an agent names one, and its worker looks it up."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.runtime.cancellation import check_cancelled
from fedpeft.transport.tasks import Hello, hello_reply, read_task

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    return hello_reply(Hello(str(context.node_config["client"]), 10, "ba5e" * 16), message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers with what was asked and how often; `state` says how to behave."""
    task = read_task(message)
    memory = context.state.array_records.get("memory")
    asked = 1 + (0 if memory is None else int(memory["asked"].numpy()[0]))
    context.state["memory"] = ArrayRecord({"asked": Array(np.array([asked]))})
    what, _, value = task.state.decode().partition(":")
    if what == "sleep":
        time.sleep(float(value))
    if what == "steps":
        for _ in range(int(value)):
            check_cancelled()
            time.sleep(0.02)
    if what == "die" and not (mark := Path(tempfile.gettempdir()) / value).exists():
        mark.touch()
        os._exit(3)
    if what == "eat":
        held = np.ones(int(value) << 17)  # so many MiB
        time.sleep(5)
        del held
    if what == "fail":
        raise ZeroDivisionError("a bug in the client")
    payload = b"x" * int(value) if what == "large" else task.state
    record: dict[str, ConfigRecordValues] = {
        "payload": payload,
        "client": str(context.node_config["client"]),
        "asked": asked,
        "pid": os.getpid(),
    }
    return Message(RecordDict({"update": ConfigRecord(record)}), reply_to=message)


impostor = ClientApp()


@impostor.query("hello")
def another_name(message: Message, context: Context) -> Message:
    return hello_reply(Hello("someone-else", 10, "ba5e" * 16), message)
