"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch: results are those of one thread, and tests share the cores
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared_dir() -> Path:
    """The folder of real data and models beside the checkout; a test that needs it skips without it."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data: no folder 'shared' beside the checkout")
    return SHARED
