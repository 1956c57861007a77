"""Was a row trained on? What an attack on a tiny model proves never exceeds the claimed epsilon."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft.config import TrainingSection
from fedpeft.models.trainable import get_arrays, set_arrays, trainable_parameters
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.noise import SeededNoise
from fedpeft.randomness import stream
from fedpeft.training.dp_sgd import train
from fedpeft.training.first_order import Rows
from fedpeft.training.record_mechanism import RecordMechanism
from tests.privacy.audit import epsilon_lower_bound
from tests.training.rows import attached, rows_for, single_gradients, still

DELTA, STEPS, TRIALS = 1e-5, 2, 600
CANARY = 3


def attack(mechanism: RecordMechanism, source: SeededNoise) -> float:
    """Train without and with the canary, from one start; the score is how far a model followed it."""
    model, all_rows = still(attached("head", "bert")), rows_for("bert", (6, 8, 5, 7))
    parameters, start = trainable_parameters(model), get_arrays(model)
    wish = single_gradients(model, parameters, all_rows, CANARY)
    options = TrainingSection(optimizer="sgd", lr=0.1, batch_size=8)

    def scores(indices: NDArray[np.int64]) -> NDArray[np.float64]:
        rows, found = Rows(all_rows.encoded, indices, all_rows.task, 0), []
        for trial in range(TRIALS):
            set_arrays(model, start)
            rng = stream(trial, "dropout")
            train(model, parameters, rows, options, steps=STEPS, rng=rng, mechanism=mechanism, source=source)
            with torch.no_grad():
                moved = sum(
                    float(((torch.from_numpy(start[name]) - p) * wish[name]).sum())
                    for name, p in parameters.items()
                )
            found.append(moved)
        return np.array(found)

    everyone = all_rows.indices
    return epsilon_lower_bound(scores(everyone[everyone != CANARY]), scores(everyone), DELTA)


def mechanism(noise_multiplier: float) -> RecordMechanism:
    return RecordMechanism(
        max_grad_norm=0.5, noise_multiplier=noise_multiplier, sample_rate=1.0, expected_batch_size=4.0
    )


def claimed(noise_multiplier: float) -> float:
    return epsilon([mechanism(noise_multiplier).event(STEPS)], DELTA)


@pytest.mark.slow
def test_a_row_is_hidden_as_claimed() -> None:
    """The next test shows that this attack can find more than a claim."""
    assert attack(mechanism(1.0), SeededNoise(stream(23, "noise"))) <= claimed(1.0)


@pytest.mark.slow
def test_a_claim_without_its_noise_is_disproved() -> None:
    assert attack(mechanism(0.01), SeededNoise(stream(23, "no noise"))) > claimed(4.0)
