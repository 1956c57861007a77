"""What a worker process does: take calls out of its slots, run them, put the results in."""

from __future__ import annotations

import os
import signal
import struct
import time
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.runtime.parent_exit import exit_with_parent
from fedpeft.workers.allocator import keep_freed_memory
from fedpeft.workers.slots import Slot

_NOTE = struct.Struct("<iqd")


class Note(NamedTuple):
    """What goes through the pipe about one call.

    Attributes:
        slot: its number; -1 tells the worker to stop.
        size: bytes in it.
        seconds: that the call took, on the way back.
    """

    slot: int
    size: int
    seconds: float


STOP = Note(-1, 0, 0.0)
_MOST = 64  # notes that are read at a time


def send(connection: Connection, notes: Iterable[Note]) -> None:
    """Put notes into the pipe: one system call, which wakes the other end once.

    Raises:
        OSError: the other end is gone.
    """
    os.write(connection.fileno(), b"".join(_NOTE.pack(*note) for note in notes))


def receive(connection: Connection) -> list[Note]:
    """Every note that is in the pipe; waits for the first.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    packed = os.read(connection.fileno(), _MOST * _NOTE.size)
    while len(packed) % _NOTE.size or not packed:
        more = os.read(connection.fileno(), _NOTE.size - len(packed) % _NOTE.size)
        if not more:
            raise EOFError
        packed += more
    return [Note(*fields) for fields in _NOTE.iter_unpack(packed)]


def work(parent: int, connection: Connection, paths: Sequence[Path]) -> None:
    """The process's whole life: until it is told to stop, or the other end is gone."""
    _settle(parent)
    slots = [Slot(path) for path in paths]
    while True:
        try:
            notes = receive(connection)
        except (EOFError, OSError):
            return
        for note in notes:
            if note == STOP:
                return
            _let_others_in()
            began, slot = time.perf_counter(), slots[note.slot]
            size = _put(slot, _outcome(slot, note.size))
            send(connection, [Note(note.slot, size, time.perf_counter() - began)])
            _let_others_in()


def _let_others_in() -> None:
    """Where processors are few, the caller takes a result in before the next one comes on top of it.

    Asked for twice around a call: once alone leaves the caller behind half of the time.
    """
    if hasattr(os, "sched_yield"):
        os.sched_yield()


def _outcome(slot: Slot, size: int) -> tuple[Exception | None, Any]:
    try:
        function, args = slot.load(size)
        return None, function(*args)
    except Exception as error:
        if not isinstance(error, FedPEFTError):  # of ours the one line says all
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        return error, None


def _put(slot: Slot, outcome: tuple[Exception | None, Any]) -> int:
    try:
        return slot.dump(outcome)
    except FedPEFTError as error:
        return slot.dump((error, None))
    except Exception as error:
        reason = FederationError(
            f"a worker's result cannot be sent back: {type(error).__name__}: {error}; of what it"
            f" came from: {outcome[0]!r}"[:500]
        )
        return slot.dump((reason, None))


def _settle(parent: int) -> None:
    """One thread, Ctrl-C is the parent's business, end with the parent."""
    torch.set_num_threads(1)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_with_parent(parent)
