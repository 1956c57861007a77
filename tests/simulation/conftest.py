"""A run small enough to be made many times."""

from __future__ import annotations

from typing import Any

import pytest


def tiny_tables() -> dict[str, Any]:
    """Four clients, three rounds of two steps on the embedded model; dropout on, so that randomness matters."""
    return {
        "run": {"name": "tiny", "rounds": 3},
        "peft": {"method": "lora", "r": 2, "lora_dropout": 0.1},
        "data": {"limit": 64, "test_limit": 16, "max_length": 128, "partitioner": {"kind": "iid", "clients": 4}},
        "training": {"steps": 2, "batch_size": 8, "lr": 7e-3},
        "evaluation": {"bootstrap": 20, "metrics": ["exact-match"]},
    }


@pytest.fixture
def tables() -> dict[str, Any]:
    """See `tiny_tables`; a copy that a test may change."""
    return tiny_tables()
