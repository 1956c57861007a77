"""The same apps on Flower's own simulation engine, which runs clients as Ray actors."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.errors import FederationError, MissingExtraError

Result = TypeVar("Result")

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def run_on_ray(hold: Callable[[Grid], Result], clients: int, workers: int) -> Result:
    """Call `hold` with Flower's simulation grid of `clients` nodes, `workers` of them at work at a time.

    Raises:
        MissingExtraError: Ray is not installed.
        FederationError: the engine ended before `hold` did.
        FedPEFTError: what `hold` raises.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(
            "--engine ray needs the package ray; install it with: pip install 'fedpeft[ray]'"
        )
    from flwr.simulation import run_simulation

    from fedpeft.flower.client_app import app as client_app

    app = ServerApp()
    results: list[Result] = []
    errors: list[Exception] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            results.append(hold(grid))
        except Exception as error:  # Flower would print a traceback and drop it
            errors.append(error)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app=app,
        client_app=client_app,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": max(workers, 1), "log_to_driver": False},
        },
    )
    if errors:
        raise errors[0]
    if not results:
        raise FederationError("Flower's simulation engine ended before the run did; see its log above")
    return results[0]
