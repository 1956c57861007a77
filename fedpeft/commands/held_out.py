"""Scoring adapters one after another on one base model, on a test set or on rows kept out of training."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedpeft.commands.adapters import resident_with_adapter
from fedpeft.commands.experts import Weights, write_folder
from fedpeft.config.sections import RunConfig
from fedpeft.errors import DataError, PrivacyError
from fedpeft.evaluation.metrics import METRICS
from fedpeft.models.export import replace_adapter_weights
from fedpeft.participant.loaded_run import LoadedRun, set_loaded_run
from fedpeft.simulation.engine import run_metrics
from fedpeft.simulation.parallel_scoring import Scorer
from fedpeft.workers import InlineWorkers


def with_held_out_test_set(run: RunConfig) -> RunConfig:
    """The run with its clients' held-out rows as its test set: its own one must choose nothing.

    Raises:
        PrivacyError: the run is private; exact scores of its clients' rows would tell what its noise hides.
    """
    if run.privacy is not None:
        raise PrivacyError(
            f"run {run.run.name} is private, and its clients' rows may choose nothing outside of it; give the"
            " coefficients yourself"
        )
    return run.model_copy(update={"data": run.data.model_copy(update={"test": None})})


class AdapterScores:
    """What adapters of one configuration score on a run's test set, on one loaded base model.

    Args:
        run: whose test set, at most `evaluation.max_examples` of it.
        config: of all adapters that will be scored, as in `adapter_config.json`.
    """

    def __init__(self, run: RunConfig, config: Mapping[str, Any]) -> None:
        evaluation = run.evaluation.model_copy(update={"bootstrap": 1})  # no intervals are looked at
        self._run = run.model_copy(update={"evaluation": evaluation})
        self._config = config
        self._resident: LoadedRun | None = None

    @property
    def primary(self) -> str:
        """The run's first metric."""
        return run_metrics(self._run)[0]

    def gain(self, weights: Weights) -> float:
        """The primary metric, turned round where lower is better."""
        value = self.of(weights)[self.primary]
        return value if METRICS[self.primary].higher_is_better else -value

    def of(self, weights: Weights) -> dict[str, float]:
        """Every metric of the run, the loss included.

        Raises:
            DataError: there are no rows to score.
        """
        resident = self._holding(weights)
        metrics = tuple(dict.fromkeys((*run_metrics(self._run), "loss")))
        evaluation = Scorer(resident, metrics, InlineWorkers()).evaluate({})
        if evaluation is None:
            raise DataError("the run has no rows to score; set data.test, or data.heldout above 0")
        return {name: score.value for name, score in evaluation.scores.items()}

    def _holding(self, weights: Weights) -> LoadedRun:
        """The base model with these weights; the base and the rows are loaded once."""
        if self._resident is None:
            torch.set_num_threads(1)
            with tempfile.TemporaryDirectory() as folder:
                write_folder(Path(folder), self._config, weights)
                self._resident = resident_with_adapter(self._run, Path(folder))
        else:
            replace_adapter_weights(self._resident.model, weights)
        set_loaded_run(self._resident)
        return self._resident
