"""`fedpeft server`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft_server.daemon import run_daemon
from fedpeft_server.settings import read_settings


def server_command(config: Path | None, given: Mapping[str, Any], *, migrate: bool) -> int:
    """Serve until told to end; the exit code.

    Raises:
        FedPEFTError: it cannot start; see `run_daemon`.
    """
    return run_daemon(read_settings(config, given), migrate=migrate)
