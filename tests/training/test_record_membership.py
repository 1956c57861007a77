"""Was a row trained on? What an attack on a tiny model proves never exceeds the claimed epsilon."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.config.sections import TrainingSection
from fedpeft.models.trainable import get_arrays, set_arrays, trainable_parameters
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.noise import SeededNoise
from fedpeft.runtime.randomness import stream
from fedpeft.training.dp_sgd import train
from fedpeft.training.first_order import Rows
from fedpeft.training.record_mechanism import RecordMechanism
from tests.privacy.audit import epsilon_lower_bound
from tests.training.rows import attached, rows_for, single_gradients, still

DELTA, STEPS, TRIALS = 1e-5, 2, 250
CANARY = 3
ROWS = rows_for("bert", (6, 8, 5, 7))
OTHERS = ROWS.indices[ROWS.indices != CANARY]
Wish = Mapping[str, Tensor]


def trained(
    model: nn.Module, start: Mapping[str, NDArray[np.float32]], indices: NDArray[np.int64],
    mechanism: RecordMechanism, source: SeededNoise, *, seed: int, steps: int = STEPS,
) -> dict[str, Tensor]:  # fmt: skip
    """How far the parameters moved from one start."""
    set_arrays(model, dict(start))
    parameters = trainable_parameters(model)
    options = TrainingSection(optimizer="sgd", lr=0.1, batch_size=8)
    rows, rng = Rows(ROWS.encoded, indices, ROWS.task, 0), stream(seed, "dropout")
    train(model, parameters, rows, options, steps=steps, rng=rng, mechanism=mechanism, source=source)
    return {name: torch.from_numpy(start[name]) - p.detach() for name, p in parameters.items()}


def attack(model: nn.Module, wish: Wish, used: RecordMechanism, *, seeds: int) -> float:
    """Train without and with the canary; the score is how far a model followed `wish`.

    Args:
        seeds: of the public randomness, one after the other; 1: the attacker knows it and it is always that.
    """
    start, source = dict(get_arrays(model)), SeededNoise(stream(23, "noise", str(used.noise_multiplier)))

    def scores(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        found = []
        for trial in range(TRIALS):
            moved = trained(model, start, indices, used, source, seed=trial % seeds)
            found.append(sum(float((moved[name] * wish[name]).sum()) for name in wish))
        return np.array(found)

    return epsilon_lower_bound(scores(OTHERS), scores(ROWS.indices), DELTA)


def mechanism(noise_multiplier: float) -> RecordMechanism:
    return RecordMechanism(
        max_grad_norm=0.5, noise_multiplier=noise_multiplier, sample_rate=1.0, expected_batch_size=4.0
    )


def claimed(noise_multiplier: float) -> float:
    return epsilon([mechanism(noise_multiplier).event(STEPS)], DELTA)


def without_dropout(noise_multiplier: float) -> float:
    """By an attacker that follows the canary's gradient."""
    model = still(attached("head", "bert"))
    wish = single_gradients(model, trainable_parameters(model), ROWS, CANARY)
    return attack(model, wish, mechanism(noise_multiplier), seeds=TRIALS)


def with_dropout(noise_multiplier: float) -> float:
    """By an attacker that knows the seed, hence all that the first step's sums differ by, masks included."""
    model = attached("head", "bert")
    start, quiet = dict(get_arrays(model)), mechanism(1e-7)
    ends = [
        trained(model, start, indices, quiet, SeededNoise(stream(1, "quiet")), seed=0, steps=1)
        for indices in (ROWS.indices, OTHERS)
    ]
    set_arrays(model, start)
    wish = {name: ends[0][name] - ends[1][name] for name in start}
    return attack(model, wish, mechanism(noise_multiplier), seeds=1)


@pytest.mark.slow
def test_a_row_is_hidden_as_claimed() -> None:
    """The next test shows that this attack can find more than a claim."""
    assert without_dropout(1.0) <= claimed(1.0)


@pytest.mark.slow
def test_a_row_is_hidden_as_claimed_with_dropout_on_and_its_seed_known() -> None:
    """Masks laid out over the batch, which one row more lays out anew, are disproved by this."""
    assert with_dropout(4.0) <= claimed(4.0)


@pytest.mark.slow
def test_a_claim_without_its_noise_is_disproved() -> None:
    assert without_dropout(0.01) > claimed(4.0)
