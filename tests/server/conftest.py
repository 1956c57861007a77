"""What tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server import postgres


@pytest.fixture(scope="session")
def cluster() -> Iterator[postgres.Cluster]:
    """A real PostgreSQL; a test that needs it skips where none is installed."""
    programs = postgres.programs()
    if programs is None:
        pytest.skip("needs PostgreSQL: no initdb here (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="needs the driver: pip install 'fedpeft[postgres]'")
    with postgres.cluster(programs) as running:
        yield running
