"""A store with one run in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.config.run_file import build_run
from fedpeft_server.store import Rules, Store, StoredRun
from tests.server.postgres import Cluster

_NUMBERS = itertools.count(1)  # of databases; only their names differ by it


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest) -> str | None:
    """Of a new database; None: the store's own file."""
    if request.param == "sqlite":
        return None
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.url(f"test_{next(_NUMBERS)}")


@pytest.fixture
def store(tmp_path: Path, url: str | None) -> Iterator[Store]:
    with Store(tmp_path / "state", url=url, busy_s=0.1) as opened:
        yield opened


@pytest.fixture
def stored(store: Store) -> StoredRun:
    run = build_run({"run": {"name": "small", "rounds": 3}}, source="test")
    return store.runs.submit(run, Rules(), submission="one", submitter="me")
