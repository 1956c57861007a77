"""From columns to an `Evaluation`: the whole test set with intervals, and each client by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.evaluation.metrics import Column, Columns, interval, value
from fedpeft.ledger.records import Evaluation, Score


def join(shards: Sequence[dict[str, Column]]) -> dict[str, NDArray[np.float64]]:
    """Shards of columns as one, ordered by row number, whoever computed which."""
    joined = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    order = np.argsort(joined["index"], kind="stable")
    return {name: column[order] for name, column in joined.items()}


def summarise(
    columns: Columns,
    metrics: Sequence[str],
    *,
    clients: Mapping[str, NDArray[np.int64]],
    client_columns: Columns | None = None,
    resamples: int,
    rng: np.random.Generator,
) -> Evaluation:
    """Scores over all of `columns`; per client over its places in `client_columns` (default: the same)."""
    count = len(columns["nll"])
    scores = {}
    for metric in metrics:
        low, high = interval(metric, columns, resamples=resamples, rng=rng)
        scores[metric] = Score(value=value(metric, columns), low=low, high=high, count=count)
    own = columns if client_columns is None else client_columns
    per_client = {
        metric: {name: value(metric, own, rows) for name, rows in clients.items() if len(rows)}
        for metric in metrics
    }
    return Evaluation(scores=scores, clients=per_client if clients else {})
