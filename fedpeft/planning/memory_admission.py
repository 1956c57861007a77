"""Whether a run fits the memory that is there, asked before any weight is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedpeft.config.sections import RunConfig
from fedpeft.data.encoded import Encoded
from fedpeft.data.federated import FederatedData
from fedpeft.data.tables import ClientRows
from fedpeft.errors import FedPEFTError, MemoryLimitError
from fedpeft.planning.fit import propose
from fedpeft.planning.memory import on_gpu
from fedpeft.planning.predict import Predictor

_MIB = 2**20


def refuse_oversized(
    run: RunConfig, data: FederatedData, *, limit: int, workers: int = 1, gpu: bool = False
) -> None:
    """Refuse a run whose prediction exceeds a limit; one that cannot be predicted passes.

    Args:
        limit: bytes.
        workers: processes that train at a time; they share the base model.
        gpu: whether the limit is a GPU's.

    Raises:
        MemoryLimitError: on one line, with what would fit.
    """
    try:
        memory = Predictor(data).memory(run)
    except FedPEFTError:
        return
    if gpu:
        memory = on_gpu(memory, run)
    alone, shared = memory.peak, memory.base
    needed = shared + workers * (alone - shared)
    if needed <= limit:
        return
    problem = f"the run would take about {needed // _MIB:,} MiB of memory, and {limit // _MIB:,} MiB are left"
    if alone <= limit:
        raise MemoryLimitError(f"{problem}; with --workers 1 it takes {alone // _MIB:,} MiB")
    best = propose(run, data, limit, libraries=0)[-1]
    if not best.fits:
        raise MemoryLimitError(f"{problem}; no settings fit: choose a smaller model, or a device with more")
    settings = " ".join(f"--set '{item}'" for item in best.settings)
    raise MemoryLimitError(f"{problem}; what would fit, in {best.total // _MIB:,} MiB: {settings}")


def without_lengths(run: RunConfig, data: FederatedData) -> FederatedData:
    """Return rows to predict a run by that hides them: for each client one, as long as rows may be.

    How much memory the client's own rows take would tell how long its longest is. None are held out: nothing
    is measured on them.
    """
    length = run.data.max_length
    row = Encoded(
        input_ids=np.zeros(length, dtype=np.int32),
        offsets=np.array([0, length], dtype=np.int64),
        answer_start=np.zeros(1, dtype=np.int32),
        labels=None if data.rows.labels is None else np.zeros(1, dtype=np.int64),
    )
    one, none = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    clients = tuple(ClientRows(client.name, one, none) for client in data.clients)
    return replace(data, rows=row, clients=clients, test=row.take(none))
