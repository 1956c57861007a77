"""Where the directions of a run come from, and what they move."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedpeft.config.sections import RunConfig
from fedpeft.models.start_magnitudes import start_magnitudes
from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.support import Support
from fedpeft.seedspace.supports import lowest_blocks, one_block, smallest_weights

SUPPORTS: dict[str, Callable[[RunConfig, nn.Module], Support]] = {  # by training.rule; the others move all
    "block-wise": lambda run, model: one_block(model, run.run.seed),
    "hybrid": lambda run, model: lowest_blocks(model, run.training.layers_below or 0),
    "sparse": lambda run, model: smallest_weights(model, run.training.density, start_magnitudes(model)),
}


def direction_stream(run: RunConfig, model: nn.Module) -> CounterStream:
    """The stream of all directions of a run; `model` is as it was loaded, at theta_0."""
    choose = SUPPORTS.get(run.training.rule) if run.training.kind == "zeroth-order" else None
    return CounterStream(run.run.seed, support=None if choose is None else choose(run, model))
