"""A run's memory before anything but rows and configurations is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from fedpeft.config.sections import RunConfig
from fedpeft.data.federated import FederatedData
from fedpeft.errors import ModelError
from fedpeft.evaluation.metrics import metrics_of
from fedpeft.models.sketch import ModelSketch, sketch
from fedpeft.planning.memory import OPTIMIZER_BYTES, Memory, estimate_memory
from fedpeft.planning.preflight import has_answers

LIBRARIES = 400 * 2**20
"""Bytes of a process that has loaded everything but a model; measured 394 MiB (RssAnon)."""


@dataclass
class Predictor:
    """Predicts runs over the same rows; a model is sketched once for all runs that share it."""

    data: FederatedData
    _sketches: dict[str, ModelSketch] = field(default_factory=dict)

    def memory(self, run: RunConfig) -> Memory:
        """What the clients that need most take; libraries and rows come on top.

        Raises:
            ModelError: the model or the method cannot be sketched.
        """
        metrics = metrics_of(run.model.task, run.evaluation.metrics, answers=has_answers(run))
        parts = [run, *(run.of_group(group) for group in run.groups)]
        unknown = [p.training.optimizer for p in parts if p.training.optimizer not in OPTIMIZER_BYTES]
        if unknown:
            raise ModelError(f"training.optimizer '{unknown[0]}' is unknown; its memory cannot be predicted")
        found = [self._sketch(part) for part in parts]  # a group may have another rank, or another base
        each = (
            estimate_memory(part, own.model, self.data, metrics, own.weights)
            for part, own in zip(parts, found, strict=True)
        )
        return max(each, key=lambda memory: memory.peak)

    def _sketch(self, run: RunConfig) -> ModelSketch:
        key = json.dumps([section.model_dump(mode="json") for section in (run.model, run.peft)])
        if key not in self._sketches:
            self._sketches[key] = sketch(run.model, run.peft, num_labels=self.data.num_labels)
        return self._sketches[key]
