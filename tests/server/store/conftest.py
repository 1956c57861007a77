"""A store with one run in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.runfile import build_run
from fedpeft_server.store import Rules, Store, StoredRun


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "state", busy_s=0.1) as opened:
        yield opened


@pytest.fixture
def stored(store: Store) -> StoredRun:
    run = build_run({"run": {"name": "small", "rounds": 3}}, source="test")
    return store.runs.submit(run, Rules(), submission="one", submitter="me")
