"""A client app that tries what a confined worker must not be able to do; `state` says what, as JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, ConfigRecordValues, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.transport.tasks import read_task

app = ClientApp()


def dial(target: str) -> object:
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def on_a_thread(target: str) -> object:
    failed: list[OSError] = []

    def work() -> None:
        try:
            Path(target).read_bytes()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return None


TRIES: dict[str, Callable[[str], object]] = {
    "dial": dial,
    "udp": lambda _: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda path: socket.socket(socket.AF_UNIX).connect(path),
    "listen": lambda _: socket.create_server(("127.0.0.1", 0)),
    "read": lambda path: Path(path).read_bytes(),
    "read on a thread": on_a_thread,
    "read by a program": lambda path: subprocess.run(["cat", path], check=True, capture_output=True),
    "list": os.listdir,
    "variable": os.environ.__getitem__,
    "write": lambda path: Path(path).write_bytes(b"x"),
    "append": lambda path: Path(path).open("ab").close(),
    "signal": lambda pid: os.kill(int(pid), 0),
    "memory": lambda pid: Path(f"/proc/{pid}/mem").read_bytes(),
}


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers with what came of each try: "done", or the error's class."""
    answers: dict[str, ConfigRecordValues] = {}
    for what, target in json.loads(read_task(message).state).items():
        try:
            TRIES[what.partition("/")[0]](target)
            answers[what] = "done"
        except (OSError, KeyError, subprocess.SubprocessError) as error:
            answers[what] = type(error).__name__
    return Message(RecordDict({"update": ConfigRecord(answers)}), reply_to=message)
