"""Making small runs and comparing what they leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.config.run_file import build_run
from fedpeft.ledger import RunFolder
from fedpeft.reporting.progress import make_progress
from fedpeft.simulation.engine import RunResult, simulate


def simulated(tables: Mapping[str, Any], out: Path, *, workers: int = 1, engine: str = "local") -> RunResult:
    """A finished run in `out`."""
    run = build_run(tables, source="test")
    with RunFolder.create(out, run) as folder, make_progress("quiet") as progress:
        return simulate(folder, workers=workers, engine=engine, progress=progress)


def resumed(out: Path, *, workers: int = 1) -> RunResult:
    """The run in `out`, brought to its end."""
    with RunFolder.resume(out) as folder, make_progress("quiet") as progress:
        return simulate(folder, workers=workers, engine="local", progress=progress)


def fingerprint(out: Path) -> dict[str, str]:
    """Digests of what equal runs share: adapter, last state, and rows without measurements."""
    rows = [strip(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = max((out / "checkpoints").iterdir())
    return {
        "adapter": _digest((out / "adapter" / "adapter_model.safetensors").read_bytes()),
        "config": _digest((out / "adapter" / "adapter_config.json").read_bytes()),
        "state": _tensors(last.read_bytes()),
        "rows": _digest(json.dumps(rows, sort_keys=True).encode()),
    }


def strip(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what is measured rather than computed."""
    return {key: value for key, value in row.items() if key not in ("wall_s", "peak_rss_mib", "engine")}


def _tensors(content: bytes) -> str:
    """Digest of a checkpoint's tensors; its header holds wall times."""
    length = int.from_bytes(content[:8], "little")
    return _digest(content[8 + length :])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
