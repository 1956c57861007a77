"""The rows of a federation as tokens.

Two steps, because a classifier's number of labels is needed before its model, and with it the tokenizer, is
loaded: `fedpeft.data.run_tables` and `fedpeft.data.tables` need no tokenizer, `encode` does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import DataSection
from fedpeft.data.control_tokens import Tokenizer
from fedpeft.data.encoded import Encoded, Task
from fedpeft.data.row_digest import rows_digest
from fedpeft.data.tables import ClientRows, RawFederated
from fedpeft.data.tokenize import tokenize
from fedpeft.errors import DataError


@dataclass(frozen=True)
class FederatedData:
    """Rows as tokens, dealt to clients.

    Attributes:
        rows: what the clients hold; `ClientRows` index it.
        clients: in natural order of their names.
        test: the global test set; without `data.test` the clients' held-out rows, client by client; empty
            when `data.heldout` is 0 as well.
        num_labels: number of classes; None for language models.
        label_names: by class id, empty for language models.
        cut_rows: rows, test set included, that were longer than `data.max_length` tokens and cut.
        dropped_rows: rows, test set included, without a single token to learn or score, and training rows
            that could not be used where rows are hidden.
        unused_rows: training rows that no client holds.
        unused_clients: clients that were left out as too small or beyond `partitioner.clients`.
        notes: what was found out about the files that a person should know.
        rows_digest: fingerprint of the rows as they were read; see `fedpeft.data.row_digest`.
    """

    rows: Encoded
    clients: tuple[ClientRows, ...]
    test: Encoded
    num_labels: int | None
    label_names: tuple[str, ...]
    cut_rows: int
    dropped_rows: int
    unused_rows: int
    unused_clients: int
    rows_digest: str
    notes: tuple[str, ...] = ()


def encode(
    raw: RawFederated, tokenizer: Tokenizer, section: DataSection, task: Task, *, hides_rows: bool = False
) -> FederatedData:
    """Tokenise rows that were read as text.

    Rows that leave nothing to learn (no token that the loss counts) are dropped and counted.

    Args:
        hides_rows: whether nothing may depend on a single row being there (`RunConfig.hides_rows`). Otherwise
            a client whose rows are all held out trains on them, and holds none out.

    Raises:
        DataError: a client is left without training rows and rows are not hidden, or the test set without
            rows.
    """
    tokenized = tokenize(raw.rows, tokenizer, section.max_length, control_tokens=section.control_tokens)
    useful = _useful(tokenized.rows, task)
    clients = tuple(_keep(client, useful) for client in raw.clients)
    if not hides_rows:
        clients = tuple(_at_work(client) for client in clients)
    cut, dropped = tokenized.cut, raw.bad_rows + int(np.sum(~useful))
    if raw.test is None:
        held = [client.heldout for client in clients] or [np.zeros(0, dtype=np.int64)]
        test = tokenized.rows.take(np.concatenate(held))
    else:
        tested = tokenize(raw.test, tokenizer, section.max_length, control_tokens=section.control_tokens)
        useful = _useful(tested.rows, task)
        test = tested.rows.take(np.flatnonzero(useful))
        cut, dropped = cut + tested.cut, dropped + int(np.sum(~useful))
        if len(test) == 0:
            raise DataError(
                "data.test has no row with a token to score; its texts are empty, name another file"
            )
    return FederatedData(
        rows=tokenized.rows,
        clients=clients,
        test=test,
        num_labels=raw.num_labels,
        label_names=raw.label_names,
        cut_rows=cut,
        dropped_rows=dropped,
        unused_rows=raw.unused_rows,
        unused_clients=raw.unused_clients,
        rows_digest=rows_digest(raw),
        notes=raw.notes,
    )


def _useful(rows: Encoded, task: Task) -> NDArray[np.bool_]:
    counted = rows.loss_tokens if task == "causal-lm" else rows.lengths
    return counted > 0


def _keep(client: ClientRows, useful: NDArray[np.bool_]) -> ClientRows:
    train, heldout = client.train, client.heldout
    return ClientRows(client.name, train[useful[train]], heldout[useful[heldout]])


def _at_work(client: ClientRows) -> ClientRows:
    """The client with rows to train on, if need be those that were to be held out."""
    if len(client.train):
        return client
    if len(client.heldout):
        return ClientRows(client.name, client.heldout, client.train)
    raise DataError(
        f"client {client.name} has no row with a token to learn; its texts are empty or one token long, "
        "mend or remove them"
    )
