"""Record-level privacy as the run file asks for it: the right trainer with the right mechanism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.config.sections import RecordLevelPrivacy, TrainingSection
from fedpeft.privacy.noise import NoiseSource
from fedpeft.spaces.base import Route, Trail
from fedpeft.training import dp_sgd, zeroth_private
from fedpeft.training.dp_sgd import PrivateReport
from fedpeft.training.first_order import Rows
from fedpeft.training.record_mechanism import RecordMechanism, draw_rows
from fedpeft.training.zeroth_prober import Prober


@dataclass(frozen=True)
class PrivateTrainingInputs:
    """What every private trainer is told of a client's part of a round.

    Attributes:
        section: `steps` is set; it is public, as everything here but the rows.
        rng: needs no secrecy; how much is drawn of it does not depend on the rows.
        source: of noise and coins, which do.
    """

    rows: Rows
    section: TrainingSection
    privacy: RecordLevelPrivacy
    rng: np.random.Generator
    source: NoiseSource

    @property
    def steps(self) -> int:
        """Local steps; preflight refuses a run file that doesn't say how many."""
        return self.section.steps or 1

    @property
    def mechanism(self) -> RecordMechanism:
        """What the run file's section promises; rows that say whose they are make persons the unit."""
        return RecordMechanism(
            max_grad_norm=self.privacy.max_grad_norm,
            noise_multiplier=self.privacy.noise_multiplier,
            sample_rate=self.privacy.sample_rate,
            expected_batch_size=self.privacy.expected_batch_size,
            unit="record" if self.rows.encoded.users is None else "person",
        )


def train_by_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    told: PrivateTrainingInputs,
    *,
    proximal_mu: float = 0.0,
) -> PrivateReport:
    """DP-SGD; see `fedpeft.training.dp_sgd.train`."""
    return dp_sgd.train(
        model,
        parameters,
        told.rows,
        told.section,
        steps=told.steps,
        rng=told.rng,
        mechanism=told.mechanism,
        source=told.source,
        proximal_mu=proximal_mu,
    )


def train_by_scalars(probe: Prober, route: Route, told: PrivateTrainingInputs) -> tuple[PrivateReport, Trail]:
    """Private zeroth order; see `fedpeft.training.zeroth_private.train`."""
    return zeroth_private.train(
        probe,
        told.rows,
        told.section,
        route,
        steps=told.steps,
        rng=told.rng,
        mechanism=told.mechanism,
        source=told.source,
    )


def gradient_sum(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], told: PrivateTrainingInputs, step_key: int
) -> NDArray[np.int64]:
    """Return what a step of DP-SGD sums before its noise if everybody's coin shows heads, in quanta, flat."""
    rows, mechanism = told.rows, told.mechanism
    drawn = draw_rows(rows, replace(mechanism, sample_rate=1.0), told.source, step_key)
    with dp_sgd.private_mode(model, told.section):
        total = dp_sgd.sum_clipped(model, parameters, rows, drawn, told.section, mechanism, step_key)
    return np.concatenate([total[name].cpu().numpy().reshape(-1) for name in parameters])


def slope_sum(
    probe: Prober, directions: Sequence[int], told: PrivateTrainingInputs, step_key: int
) -> NDArray[np.int64]:
    """Return what a private zeroth-order step sums before its noise, as `gradient_sum`: one per direction."""
    rows, mechanism = told.rows, told.mechanism
    drawn = draw_rows(rows, replace(mechanism, sample_rate=1.0), told.source, step_key)
    slopes = zeroth_private.example_slopes(probe, rows, drawn, list(directions), told.section.radius)
    return zeroth_private.sum_clipped(slopes, mechanism)
