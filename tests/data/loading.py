"""Rows of a section, read and tokenised at once."""

from __future__ import annotations

from pathlib import Path

from fedpeft.config.sections import DataSection
from fedpeft.data.control_tokens import Tokenizer
from fedpeft.data.encoded import Task
from fedpeft.data.federated import FederatedData, encode
from fedpeft.data.run_tables import read_tables
from fedpeft.data.tables import read_client_table


def load_federated(
    section: DataSection, *, task: Task, tokenizer: Tokenizer, seed: int, hides_rows: bool = False
) -> FederatedData:
    """All clients of a simulation."""
    return encode(
        read_tables(section, task, seed, hides_rows=hides_rows),
        tokenizer,
        section,
        task,
        hides_rows=hides_rows,
    )


def load_client(
    section: DataSection,
    path: Path,
    *,
    task: Task,
    tokenizer: Tokenizer,
    seed: int,
    name: str,
    hides_rows: bool = False,
) -> FederatedData:
    """One device."""
    raw = read_client_table(section, path, task, seed, name, hides_rows=hides_rows)
    return encode(raw, tokenizer, section, task, hides_rows=hides_rows)
