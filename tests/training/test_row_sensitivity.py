"""One record, or one person, moves a private step by at most the bound: from a file of rows to what is sent.

The noise is a ten-millionth of the bound, everybody's coin shows heads, dropout is on, and everybody knows
the seed. What is compared is what the trainers leave behind, so nothing between the file and the sum is taken
for granted. The same at single steps, in exact numbers: `tests/simulation/test_sensitivity.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from fedpeft.config.sections import DataSection, PeftSection, RecordLevelPrivacy, TrainingSection
from fedpeft.data.federated import encode
from fedpeft.data.tables import read_client_table
from fedpeft.models.attach import attach
from fedpeft.models.methods import METHODS
from fedpeft.models.trainable import get_arrays, set_arrays, trainable_parameters
from fedpeft.privacy.noise import SeededNoise
from fedpeft.runtime.randomness import stream
from fedpeft.seedspace.layout import CounterStream
from fedpeft.spaces.base import Route
from fedpeft.training import private
from fedpeft.training.first_order import Rows
from fedpeft.training.zeroth_prober import prober
from tests.models.test_method_contract import base_for
from tests.models.tiny import LABELS, TASKS, tiny_tokenizer

BOUND, QUERIES = 0.25, 6
SLACK = 1e-4  # of the bound: noise, and float32 weights that the sum is read from
UNIT_NEIGHBOURS = 4
PRIVACY = RecordLevelPrivacy(
    kind="record-level",
    max_grad_norm=BOUND,
    noise_multiplier=1e-7,
    sample_rate=1.0,
    expected_batch_size=1.0,
    target_delta=1e-5,
    max_epsilon=1e9,
)
DROPOUT: dict[str, dict[str, Any]] = {"lora": {"lora_dropout": 0.2}, "dora": {"lora_dropout": 0.2}}
SAMPLED = [("lora", "llama"), ("lora", "bert"), ("prompt", "llama"), ("full", "bert"), ("head", "bert")]
EVERY = [
    (name, kind)
    for name, method in METHODS.items()
    for kind in ("llama", "bert", "llama-classifier")
    if TASKS[kind] in method.tasks
    and not (method.needs_bias and kind != "bert")
    and not (method.virtual_tokens and kind == "llama-classifier")
]
CASES = [
    pytest.param(*case, marks=() if case in SAMPLED else pytest.mark.exhaustive, id="-".join(case))
    for case in EVERY
]


def records(count: int, seed: int) -> list[dict[str, Any]]:
    """Of three persons for each eight records; some twice, some filtered out, some without a field."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for number in range(count):
        words = [" ".join(f"w{w}" for w in rng.integers(2, 96, rng.integers(2, 9))) for _ in range(3)]
        row = {"q": words[0] + " ", "a": words[1], "y": int(rng.integers(LABELS)), "keep": number % 5 != 4}
        row |= {"who": f"p{number * 3 // 8}", "turns": words[1 : 2 + number % 2]}
        if number % 7 == 3:
            del row["q"]
        found.append(found[int(rng.integers(number))] if number and number % 6 == 5 else row)
    return found


def section_for(kind: str, path: Path, unit: str) -> DataSection:
    keys: dict[str, Any] = {"train": str(path), "heldout": 0.25, "filter": {"keep": True}}
    keys |= {"partitioner": {"kind": "files"}, "max_length": 12}
    if TASKS[kind] == "causal-lm":
        keys |= {"prompt": "{q}", "answer": "{turns}" if unit == "person" else "{a}"}
    else:
        keys |= {"text": "{q}{turns}" if unit == "person" else "{q}", "label": "y"}
        keys |= {"labels": list(range(LABELS))}
    return DataSection.model_validate(
        keys | ({"user": "who", "explode": "turns"} if unit == "person" else {})
    )


class Scene:
    """A model in one state, and what one private step makes of a file of rows."""

    def __init__(self, method: str, kind: str, unit: str, folder: Path) -> None:
        self.kind, self.unit, self.folder = kind, unit, folder
        section = PeftSection.model_validate({"method": method} | DROPOUT.get(method, {}))
        self.model: nn.Module = attach(base_for(method, kind), section, task=TASKS[kind], seed=5)
        self.start = {
            name: array + 0.05 * np.random.default_rng(1).standard_normal(array.shape).astype(np.float32)
            for name, array in get_arrays(self.model).items()
        }

    def told(
        self, rows: Sequence[dict[str, Any]], training: TrainingSection, seed: int
    ) -> private.PrivateTrainingInputs:
        path = self.folder / "client.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = section_for(self.kind, path, self.unit)
        task: Any = TASKS[self.kind]
        raw = read_client_table(section, path, task, seed, "client", hides_rows=True)
        data = encode(raw, tiny_tokenizer(), section, task, hides_rows=True)
        train = Rows(data.rows, data.clients[0].train, task, pad_id=0)
        rng, source = stream(seed, "train", "client", 1), SeededNoise(stream(seed, "noise", len(rows)))
        return private.PrivateTrainingInputs(train, training, PRIVACY, rng, source)

    def gradients(self, rows: Sequence[dict[str, Any]], seed: int) -> NDArray[np.float64]:
        """Minus the sum that one step of DP-SGD releases."""
        training = TrainingSection(optimizer="sgd", lr=1.0, steps=1, batch_size=4)
        set_arrays(self.model, self.start)
        told = self.told(rows, training, seed)
        private.train_by_gradients(self.model, trainable_parameters(self.model), told)
        after = get_arrays(self.model)
        moved = [(after[name].astype(np.float64) - self.start[name]).reshape(-1) for name in self.start]
        return np.concatenate(moved)

    def scalars(self, rows: Sequence[dict[str, Any]], seed: int) -> NDArray[np.float64]:
        """Minus the sum that one private zeroth-order step releases."""
        training = TrainingSection(kind="zeroth-order", lr=1.0, steps=1, queries=QUERIES, radius=1e-2)
        set_arrays(self.model, self.start)
        told = self.told(rows, training, seed)
        route = Route(np.arange(QUERIES) + 3, exponent=-40, largest=2**60)
        _, trail = private.train_by_scalars(prober(self.model, CounterStream(11)), route, told)
        return np.ldexp(trail.amounts.astype(np.float64), -40) * QUERIES


def without(rows: Sequence[dict[str, Any]], unit: str, number: int) -> list[dict[str, Any]]:
    """The neighbour without one record, or without all records of the person of one."""
    if unit == "record":
        return [row for place, row in enumerate(rows) if place != number]
    return [row for row in rows if row["who"] != rows[number]["who"]]


def distances(scene: Scene, order: str, neighbours: int, seed: int) -> list[float]:
    """How far neighbours are apart, over the bound."""
    rng, release = np.random.default_rng(seed), {"first": scene.gradients, "zeroth": scene.scalars}[order]
    found = []
    for trial in range(neighbours):
        rows = records(int(rng.integers(8, 20)), seed + trial)
        fewer = without(rows, scene.unit, int(rng.integers(len(rows))))
        found.append(
            float(np.linalg.norm(release(rows, seed + trial) - release(fewer, seed + trial))) / BOUND
        )
    return found


@pytest.mark.parametrize("unit", ["record", "person"])
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_unit_moves_a_gradient_step_by_at_most_the_bound(
    method: str, kind: str, unit: str, tmp_path: Path
) -> None:
    found = distances(Scene(method, kind, unit, tmp_path), "first", UNIT_NEIGHBOURS, seed=2)
    assert max(found) <= 1.0 + SLACK


@pytest.mark.parametrize("unit", ["record", "person"])
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_unit_moves_a_zeroth_order_step_by_at_most_the_bound(
    method: str, kind: str, unit: str, tmp_path: Path
) -> None:
    found = distances(Scene(method, kind, unit, tmp_path), "zeroth", UNIT_NEIGHBOURS, seed=2)
    assert max(found) <= 1.0 + SLACK


@pytest.mark.parametrize("order", ["first", "zeroth"])
@pytest.mark.parametrize("unit", ["record", "person"])
def test_the_bound_is_reached(order: str, unit: str, tmp_path: Path) -> None:
    """So the distances above are of steps that rows have a part in."""
    found = distances(Scene("full", "bert", unit, tmp_path), order, UNIT_NEIGHBOURS, seed=2)
    assert max(found) > 0.9


def test_dropout_is_on(tmp_path: Path) -> None:
    """Two seeds drop other units, which moves even the sum of equal rows; one seed gives it again."""
    scene = Scene("head", "bert", "record", tmp_path)
    rows = [row for row in records(3, 1) if row["keep"]][:1] * 8
    sums = []
    for seed in range(40):
        scene_sum = scene.gradients(rows, seed)
        if np.linalg.norm(scene_sum) > 0.5 * BOUND:  # else the row is held out
            sums.append(scene_sum)
            assert np.linalg.norm(scene.gradients(rows, seed) - scene_sum) < SLACK
        if len(sums) == 2:
            break
    assert np.linalg.norm(sums[0] - sums[1]) > 0.1 * BOUND
