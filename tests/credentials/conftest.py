"""A new authority for every test: making one takes a millisecond."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.credentials import Authority, create_authority
from tests.credentials.federation import NOW


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "ca", NOW)
