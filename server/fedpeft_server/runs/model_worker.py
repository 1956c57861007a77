"""A process that holds a run's model for the daemon: it checks run files, evaluates and writes adapters.

It reads orders from a socket that it inherits, and each brings all that it needs: nothing is lost with the
process but time.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedpeft.config.run_file import run_digest, run_from_json
from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.flower.server_app import RoundServer
from fedpeft.ledger import Checkpoint
from fedpeft.participant.loaded_run import LoadedRun, set_loaded_run
from fedpeft.planning.preflight import refuse_problems
from fedpeft.privacy.kinds import is_cohort_secret
from fedpeft.runtime.frames import Frame, pack, read_frame
from fedpeft.runtime.parent_exit import exit_with_parent
from fedpeft.seedspace.trainable_tensors import trainable_parameters
from fedpeft.simulation.engine import Deployment, execute_run, make_start_row, run_metrics, write_adapter
from fedpeft.simulation.parallel_scoring import Scorer, may_score
from fedpeft.updates.update import Arrays
from fedpeft.wire.failures import to_record
from fedpeft.workers import InlineWorkers, Workers
from fedpeft_server.runs.in_process_host import load_for_server, write_snapshot
from fedpeft_server.runs.journal_lines import LoggedProgress
from fedpeft_server.runs.model_host import RunStorage
from fedpeft_server.store import Reference, StoredRounds, say
from fedpeft_server.store.blobs import BlobFolder
from fedpeft_server.store.database import Database

LOG = logging.getLogger("fedpeft.server")
_OOM_SCORE = 500  # of 1,000: ahead of whatever weighs less than half of the memory more


def main(fd: int, keep_s: float, parent: int) -> None:
    """Serve orders until the daemon, of process id `parent`, hangs up, or asks nothing for `keep_s`."""
    exit_with_parent(parent)
    _offer_to_the_oom_killer()
    bench = ModelWorker()
    with socket.socket(fileno=fd) as pipe, pipe.makefile("rb") as orders:
        while _comes(pipe, keep_s) and (order := read_frame(orders)) is not None:
            pipe.sendall(pack(bench.execute(order)))


def _offer_to_the_oom_killer() -> None:
    """Where memory runs out, this process goes before the daemon, which would take all runs with it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(f"{_OOM_SCORE}\n")


def _comes(pipe: socket.socket, keep_s: float) -> bool:
    return bool(select.select([pipe], [], [], keep_s)[0])


class ModelWorker:
    """Does orders, and keeps the model of the last one."""

    def __init__(self) -> None:
        self._resident: LoadedRun | None = None
        self._start: Arrays = {}
        self._orders: dict[str, Callable[[Frame], Frame]] = {
            "check": self._check,
            "load": self._load,
            "describe": self._describe,
            "evaluate": self._evaluate,
            "finish": self._finish,
            "export": self._export,
            "snapshot": self._snapshot,
        }

    def execute(self, order: Frame) -> Frame:
        """One order's answer; what goes wrong is part of it."""
        try:
            return self._orders[order.header["do"]](order)
        except FedPEFTError as error:
            return Frame({"error": to_record(error)})
        except Exception as error:
            LOG.exception("an order of the daemon failed")
            return Frame({"error": to_record(error)})

    def _check(self, order: Frame) -> Frame:
        refuse_problems(run_from_json(order.header["run"]), source="run file")
        return Frame({})

    def _load(self, order: Frame) -> Frame:
        self._ensure_loaded(order)
        return Frame({})

    def _describe(self, order: Frame) -> Frame:
        """All that holding the rounds takes, and in a seed space the weights, as float32 in a file."""
        resident = self._as_loaded(order)
        run = resident.run
        weights = _weights_of(resident) if run.space.kind == "seed-scalars" else {}
        plain = not resident.start and all(array.dtype == np.float32 for array in weights.values())
        if plain and weights:
            np.save(
                order.header["weights"], np.concatenate([array.reshape(-1) for array in weights.values()])
            )
        return Frame(
            {
                "plain": plain,
                "base_digest": resident.base_digest,
                "started": make_start_row(resident, run_metrics(run), "grpc", None).model_dump_json(),
                "scores": bool(len(resident.data.test)) and may_score(run),
                "clients_here": resident.clients_here,
                "shapes": {name: list(array.shape) for name, array in weights.items()},
            },
            {"state": save(dict(self._start)), "start": resident.start_bytes},
        )

    def _evaluate(self, order: Frame) -> Frame:
        resident = self._ensure_loaded(order)
        scorer = Scorer(resident, run_metrics(resident.run), InlineWorkers())
        found = scorer.evaluate(load(order.parts["state"]))
        return Frame({"evaluation": None if found is None else found.model_dump_json()})

    def _finish(self, order: Frame) -> Frame:
        """All that comes after the last round."""
        book, database = _open(order)
        with closing(database), book.open() as folder:
            progress = LoggedProgress(
                order.header["id"],
                lambda text: say(database, order.header["id"], text),
                begun=True,
                refused=lambda agent, why: None,
                secret_cohort=is_cohort_secret(book.run),
            )
            venue = Deployment("grpc", _no_rounds, lambda run: self._as_loaded(order))
            execute_run(folder, venue, progress, spent_s=order.header["spent_s"])
        return Frame({})

    def _export(self, order: Frame) -> Frame:
        book, database = _open(order)
        with closing(database), book.open() as folder:
            last = book.rounds.latest()
            if last is not None:
                write_adapter(self._ensure_loaded(order), folder, last)
        return Frame({})

    def _snapshot(self, order: Frame) -> Frame:
        book, database = _open(order)
        with closing(database):
            write_snapshot(self._ensure_loaded(order), book, Path(order.header["to"]))
        return Frame({})

    def _ensure_loaded(self, order: Frame) -> LoadedRun:
        run = run_from_json(order.header["run"])
        if self._resident is None or self._resident.run_digest != run_digest(run):
            self._resident = None  # before the next one takes memory
            self._resident = load_for_server(run)
            self._start = self._resident.initial_state()
        set_loaded_run(self._resident)
        return self._resident

    def _as_loaded(self, order: Frame) -> LoadedRun:
        """With its parameters where the run starts, whatever was evaluated meanwhile."""
        resident = self._ensure_loaded(order)
        resident.space.enter(resident.parameters, self._start)
        return resident


def _weights_of(resident: LoadedRun) -> dict[str, NDArray[Any]]:
    """What directions of a seed space move, by canonical name, sorted."""
    found = trainable_parameters(resident.model)
    return {name: _array_of(parameter.detach()) for name, parameter in sorted(found.items())}


def _array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor itself where it is float32; a mark in its place of a type that NumPy may not have."""
    return tensor.cpu().numpy() if tensor.dtype == torch.float32 else np.zeros(0, dtype=np.float16)


def _open(order: Frame) -> tuple[RunStorage, Database]:
    """The run's place in the daemon's database and folders, which this process has for itself meanwhile."""
    header, run = order.header, run_from_json(order.header["run"])
    database, blobs = Database(header["database"], epoch=header["epoch"]), BlobFolder(Path(header["blobs"]))
    rounds = StoredRounds(database, blobs, header["id"], run_digest(run), keep=run.output.keep_checkpoints)
    reference = Reference(header["database"], blobs.folder, header["epoch"])
    return RunStorage(header["id"], run, reference, Path(header["folder"]), rounds), database


def _no_rounds(server: RoundServer, last: Checkpoint | None, pool: Workers) -> Checkpoint:
    """The daemon has held them all."""
    if last is None:
        raise FederationError("the run has no round; it cannot be finished")
    return last


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # taking the libraries down in order takes seconds and frees nothing that the end does not
