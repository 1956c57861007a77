"""Layer-sampled training: in each period a few layers train and the others rest.

Source: Pan et al. 2024, "LISA" (arXiv 2403.17919), algorithm 1. As there, what lies in no numbered layer
(embeddings, norms, the head) always trains where the PEFT method trains it at all. Layers are drawn from the
run's seed and the round, so that all clients of a round train the same ones: the mean over clients then isn't
thinned by clients in which a layer rested, and its change is exactly zero where all rested. Resting layers
lose their moments, as the paper's memory asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fedpeft.config.sections import TrainingSection
from fedpeft.errors import TrainingError

_NUMBERED = re.compile(r"\.(?:layers?|h|blocks?|block)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter lies in, by its full name; None outside of layers."""
    found = _NUMBERED.search(name)
    return None if found is None else int(found[1])


def layers_of(names: Sequence[str]) -> list[int]:
    """Numbers of the layers that parameters lie in, ascending."""
    return sorted({number for name in names if (number := layer_of(name)) is not None})


def check_layers(section: TrainingSection, names: Sequence[str]) -> None:
    """Compare what a section samples with what there is to sample.

    Raises:
        TrainingError: fewer layers hold trained parameters.
    """
    there = len(layers_of(names))
    if section.kind == "first-order" and (section.sampled_layers or 0) > there:
        raise TrainingError(
            f"training.sampled_layers is {section.sampled_layers}, and trained parameters lie in {there}"
            " layers; give at most so many, or remove it"
        )


class Periods:
    """Which parameters train in which local step.

    Args:
        parameters: all that the method trains, by full name.
        section: `sampled_layers` None: all of them, all the time.
        rng: of the draws; the same for all clients of a round.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], section: TrainingSection, rng: np.random.Generator
    ) -> None:
        self._parameters = parameters
        self._layers = layers_of(list(parameters))
        self._count, self._every = section.sampled_layers, section.sample_every
        self._rng = rng

    def turn(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Before local step `step`, counted from 0: let a new period begin where one is due."""
        if self._count is None or (step if self._every is None else step % self._every):
            return
        chosen = set(self._rng.choice(self._layers, size=self._count, replace=False).tolist())
        for name, parameter in self._parameters.items():
            number = layer_of(name)
            parameter.requires_grad_(number is None or number in chosen)
            if not parameter.requires_grad:
                optimizer.state.pop(parameter, None)

    @contextmanager
    def over(self) -> Iterator[Periods]:
        """Afterwards all parameters can be trained again."""
        try:
            yield self
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
