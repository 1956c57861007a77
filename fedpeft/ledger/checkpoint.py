"""One round, whole, in one file: the state, what strategy and clients remember, and the round's row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpeft.errors import StateError
from fedpeft.ledger.records import Round
from fedpeft.runtime.files import storage, write_atomically
from fedpeft.updates.update import Arrays, arrays_digest, freeze_arrays

VERSION = 1
_PARTS = ("state", "strategy", "client", "downlink", "privacy", "pending")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round depends on.

    Attributes:
        run_digest: the run it belongs to.
        round: the last finished round; 0 before the first.
        state: the global state after it.
        strategy: what the server's strategy remembers.
        clients: what clients remember, ``"<client>/<array>"`` to array.
        downlink: what the server remembers of the state's way down: its error feedback, and who holds what.
        privacy: what the next round's privacy needs: the adaptive clipping bound.
        pending: who is still at work, and on which round's state; buffered rounds only.
        row: the round's record.
        rows_digest: of the rows that it was trained on, where that may stand beside it; "" elsewhere. See
            `fedpeft.data.row_digest`.
    """

    run_digest: str
    round: int
    state: Arrays
    row: Round
    strategy: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    clients: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    downlink: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    privacy: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    pending: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rows_digest: str = ""


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it to a file, atomically.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    write_atomically(path, checkpoint_bytes(checkpoint))


def checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    """A checkpoint as safetensors; arrays and row are covered by a digest in the header."""
    tensors: dict[str, NDArray[Any]] = {}
    held = (
        checkpoint.state,
        checkpoint.strategy,
        checkpoint.clients,
        checkpoint.downlink,
        checkpoint.privacy,
        checkpoint.pending,
    )
    for part, arrays in zip(_PARTS, held, strict=True):
        tensors.update({f"{part}/{name}": np.asarray(array, order="C") for name, array in arrays.items()})
    row = checkpoint.row.model_dump_json()
    header = {
        "version": VERSION,
        "run": checkpoint.run_digest,
        "round": checkpoint.round,
        "row": row,
        **({"rows": checkpoint.rows_digest} if checkpoint.rows_digest else {}),
        "digest": _digest(tensors, row, checkpoint.run_digest, checkpoint.round, checkpoint.rows_digest),
    }
    # One key, since safetensors writes several in any order and equal checkpoints shall be equal files.
    content: bytes = save(tensors, metadata={"fedpeft": json.dumps(header)})
    return content


def read_checkpoint(path: Path, run_digest: str) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        StateError: it is corrupt, of another version, or of another run.
        StorageError: it cannot be read.
    """
    with storage(path):
        content = path.read_bytes()
    return parse_checkpoint(content, path, run_digest)


def parse_checkpoint(content: bytes, path: Path, run_digest: str) -> Checkpoint:
    """Inverse of `checkpoint_bytes`; raises as `read_checkpoint` does.

    Args:
        path: where it came from, for errors.
    """
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fedpeft"])
        version, came_from = int(header["version"]), header["run"]
        round_, row, digest = int(header["round"]), header["row"], header["digest"]
        rows_digest = str(header.get("rows", ""))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _corrupt(path) from error
    if version != VERSION:
        raise StateError(
            f"{path}: checkpoint version {version} came, {VERSION} is read here; resume with the fedpeft"
            " that wrote it"
        )
    if came_from != run_digest:
        raise StateError(
            f"{path}: this checkpoint is of run {came_from[:12]}, the run file is {run_digest[:12]}; use"
            " the run file"
            " beside it, or another --out"
        )
    if _digest(tensors, row, run_digest, round_, rows_digest) != digest:
        raise _corrupt(path)
    parts: dict[str, dict[str, NDArray[Any]]] = {part: {} for part in _PARTS}
    for key, array in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = array
    state, strategy, clients, downlink, privacy, pending = (freeze_arrays(parts[part]) for part in _PARTS)
    record = Round.model_validate_json(row)
    return Checkpoint(
        run_digest, round_, state, record, strategy, clients, downlink, privacy, pending, rows_digest
    )


def _digest(
    tensors: Mapping[str, NDArray[Any]], row: str, run_digest: str, round_: int, rows_digest: str
) -> str:
    text = f"{run_digest}\0{round_}\0{row}" + (f"\0{rows_digest}" if rows_digest else "")
    return arrays_digest({**tensors, "": np.frombuffer(text.encode(), dtype=np.uint8)})


def _corrupt(path: Path) -> StateError:
    return StateError(
        f"{path}: the checkpoint is corrupt; delete it, and the run resumes from the one before"
    )
