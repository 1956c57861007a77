"""The embedded rows as parts that read like files: each client's training rows, then its held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from fedpeft.config.sections import DataSection
from fedpeft.data.embedded import Row, make_federated_rows
from fedpeft.data.readers import NumberedRow
from fedpeft.data.section_layout import EMBEDDED
from fedpeft.data.sources import Part

DEFAULT_CLIENTS = 8
TRAIN_ROWS = 192  # per client, where data.limit does not say otherwise
TEST_ROWS = 24


def list_embedded_parts(section: DataSection, seed: int) -> tuple[Part, ...]:
    """Two parts per client, training and held-out rows, the clients in order.

    `data.limit` and `data.test_limit` are shared out evenly among the clients.

    Raises:
        DataError: more clients or rows than the generator can make.
    """
    clients = section.partitioner.clients or DEFAULT_CLIENTS
    train_rows = max(1, section.limit // clients) if section.limit else TRAIN_ROWS
    test_rows = max(1, section.test_limit // clients) if section.test_limit else TEST_ROWS
    train, test = make_federated_rows(seed, clients, train_rows, test_rows)
    width = len(str(clients - 1))
    return tuple(
        _part(f"client-{client:0{width}d}", [row for row in rows if row.client == client])
        for client in range(clients)
        for rows in (train, test)
    )


def _part(name: str, rows: Sequence[Row]) -> Part:
    def numbered() -> Iterator[NumberedRow]:
        return ((number, asdict(row)) for number, row in enumerate(rows, start=1))

    return Part(name, f"{EMBEDDED} {name}", numbered)
