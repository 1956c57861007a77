"""Training in less memory: each way moves what it says, by numbers worked out otherwise, or is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import ModelSection, PeftSection, TrainingSection
from fedpeft.errors import RunFileError, TrainingError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.trainable import get_arrays, trainable_parameters
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.planning.preflight import problems_of
from fedpeft.runtime.randomness import stream
from fedpeft.training.eight_bit import BLOCK, SMALLEST, count_kept_bytes
from fedpeft.training.first_order import train
from fedpeft.training.layers import layer_of, layers_of
from fedpeft.training.lean import SAVERS, device_problems
from fedpeft.training.projected_adam import ProjectedAdam, count_kept_numbers
from tests.training.test_first_order import ROWS, distance, fresh, trained

BATCH = {"lr": 1e-3, "batch_size": 6}


def section(**keys: Any) -> TrainingSection:
    return TrainingSection.model_validate(BATCH | keys)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adafactor", "galore"])
def test_fused_updates_are_the_usual_ones_bit_for_bit(optimizer: str) -> None:
    usual = trained(section(optimizer=optimizer, weight_decay=0.1), mu=0.5)
    fused = trained(section(optimizer=optimizer, weight_decay=0.1, fused_update=True), mu=0.5)
    assert distance(usual, fused) == 0.0
    assert usual["report"] == fused["report"]


def test_fused_updates_hold_one_gradient_at_a_time() -> None:
    model = fresh()
    parameters = trainable_parameters(model)
    most = [0]

    def look(_: torch.Tensor) -> None:
        most[0] = max(most[0], sum(p.grad is not None for p in parameters.values()))

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]  # torch's
    for fused, expected in ((False, len(parameters)), (True, 1)):
        most[0] = 0
        train(model, parameters, ROWS, section(fused_update=fused), steps=1, rng=stream(0, "x"))
        assert most[0] == expected
    assert all(parameter.grad is None for parameter in parameters.values())


def moved_layers(keys: dict[str, Any], rng: np.random.Generator, steps: int = 3) -> set[int | None]:
    model = fresh()
    before, own = get_arrays(model), stream(1, "x")
    train(model, trainable_parameters(model), ROWS, section(**keys), steps=steps, rng=own, layers_rng=rng)
    assert all(parameter.requires_grad for parameter in trainable_parameters(model).values())
    after = get_arrays(model)
    assert after.keys() == before.keys()
    return {layer_of(name) for name in before if np.any(after[name] != before[name])}


def test_sampled_layers_move_and_the_others_rest() -> None:
    drawn = stream(0, "layers").choice(4, size=2, replace=False)
    assert moved_layers({"sampled_layers": 2}, stream(0, "layers")) == set(drawn.tolist())
    draws = stream(0, "layers")
    union = {int(draws.choice(4, size=1, replace=False)[0]) for _ in range(3)}
    assert moved_layers({"sampled_layers": 1, "sample_every": 1}, stream(0, "layers")) == union
    assert len(union) > 1, "a seed that tells one draw from three"


def test_what_lies_in_no_layer_always_trains() -> None:
    model = attach(load_base(ModelSection()), PeftSection(method="full"), task="causal-lm", seed=0)
    before = get_arrays(model)
    parameters = trainable_parameters(model)
    train(model, parameters, ROWS, section(sampled_layers=1), steps=1, rng=stream(0, "x"))
    after = get_arrays(model)
    moved = {name for name in before if np.any(after[name] != before[name])}
    assert {layer_of(name) for name in moved} >= {None}
    assert len(layers_of(sorted(moved))) == 1
    assert layers_of(sorted(before)) == [0, 1, 2, 3]


def test_clients_of_a_round_train_the_same_layers_and_rounds_differ() -> None:
    run = build_run(
        {
            "run": {"name": "lisa", "rounds": 4},
            "peft": {"method": "lora", "r": 2},
            "data": {"limit": 24, "partitioner": {"kind": "iid", "clients": 2}},
            "training": BATCH | {"steps": 1, "sampled_layers": 1},
        },
        source="test",
    )
    resident = load_simulated_run(run)
    state = resident.space.initial_state(resident.parameters)
    seen: list[int | None] = []
    for round_ in range(1, 5):
        layers = []
        for client in (0, 1):
            update, _ = resident.train_client(client, round_, state, proximal_mu=0.0)
            layers.append({layer_of(name) for name, array in update.arrays.items() if np.any(array)})
        assert layers[0] == layers[1]
        assert len(layers[0]) == 1
        seen += layers[0]
    assert len(set(seen)) > 1


def adam_in_a_subspace(weight: np.ndarray, gradients: list[np.ndarray], rank: int, every: int) -> Any:
    """Algorithm 2 of the paper in float64, with a singular value decomposition."""
    first = second = np.zeros(())
    subspace = np.zeros(())
    for count, gradient in enumerate(gradients):
        if count % every == 0:
            subspace = np.linalg.svd(gradient)[2][:rank].T
            subspace = subspace * np.sign([column[np.argmax(np.abs(column))] for column in subspace.T])
        inside = gradient @ subspace
        first, second = 0.9 * first + 0.1 * inside, 0.999 * second + 0.001 * inside**2
        mean, size = first / (1 - 0.9 ** (count + 1)), second / (1 - 0.999 ** (count + 1))
        weight = weight - 0.01 * 0.25 * (mean / (np.sqrt(size) + 1e-8)) @ subspace.T
    return weight


@pytest.mark.parametrize("steps", [3, 8])  # one period, and two renewals of the subspace
@pytest.mark.parametrize("tall", [True, False])
def test_projected_adam_follows_its_paper(tall: bool, steps: int) -> None:
    draws = np.random.default_rng(0)
    weight, gradients = draws.normal(size=(12, 7)), [draws.normal(size=(12, 7)) for _ in range(steps)]
    expected = adam_in_a_subspace(weight, gradients, rank=3, every=3)
    if steps > 3:  # the renewal shows
        assert np.abs(expected - adam_in_a_subspace(weight, gradients, rank=3, every=steps)).max() > 1e-3

    def turn(array: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        return array if tall else array.T

    parameter = nn.Parameter(torch.from_numpy(turn(weight).copy()).float())
    optimizer = ProjectedAdam([parameter], lr=0.01, weight_decay=0.0, rank=3, every=3, scale=0.25)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(turn(gradient).copy()).float()
        optimizer.step()
    np.testing.assert_allclose(turn(parameter.detach().numpy()), expected, atol=2e-6)
    kept = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in kept) == count_kept_numbers(tuple(parameter.shape), 3) == 2 * 12 * 3 + 7 * 3


def test_projected_adam_moves_what_it_cannot_project_as_adam_does() -> None:
    for shape in ((5,), (4, 3), (2, 3, 4)):
        one, two = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        ours = ProjectedAdam([one], lr=0.1, weight_decay=0.01, rank=3, every=2, scale=0.5)
        theirs = torch.optim.AdamW([two], lr=0.1, weight_decay=0.01)
        draws = torch.Generator().manual_seed(0)
        for _ in range(4):
            one.grad = torch.randn(shape, generator=draws)
            two.grad = one.grad.clone()
            ours.step()
            theirs.step()
        torch.testing.assert_close(one, two)


def test_eight_bit_moments_take_what_is_said() -> None:
    optim = pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'").optim
    for numbers in (SMALLEST - 1, SMALLEST, 5 * BLOCK * 16 + 1):
        parameter = nn.Parameter(torch.ones(numbers))
        optimizer = optim.AdamW8bit([parameter], lr=1e-3)
        parameter.grad = torch.ones(numbers)
        optimizer.step()
        kept = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
        assert sum(v.nbytes for k, v in kept.items() if "qmap" not in k) == count_kept_bytes(
            "adamw8bit", numbers
        )


def run_of(**training: Any) -> Any:
    tables: dict[str, Any] = {"run": {"name": "lean", "rounds": 1}, "training": training}
    privacy = training.pop("privacy", None)
    if privacy is not None:
        tables["privacy"] = privacy
    return build_run(tables, source="test")


@pytest.mark.parametrize(
    ("training", "words"),
    [
        (
            {"fused_update": True, "gradient_accumulation": 2},
            "training.fused_update: .*accumulation 1",
        ),
        ({"fused_update": True, "max_grad_norm": 1.0}, "training.fused_update: .*remove max_grad_norm"),
        ({"sample_every": 2}, "training.sample_every: belongs to sampled_layers"),
        ({"projection_rank": 4}, "training.projection_rank: belongs to optimizer 'galore'"),
        ({"kind": "zeroth-order", "fused_update": True}, "training.fused_update: a zeroth-order trainer"),
        ({"kind": "zeroth-order", "sampled_layers": 1}, "training.sampled_layers: a zeroth-order trainer"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(training: dict[str, Any], words: str) -> None:
    problems = problems_of(run_of(**training))
    assert len(problems) == 1
    assert re.search(words, problems[0])


def test_record_level_privacy_needs_every_gradient() -> None:
    privacy = {
        "kind": "record-level",
        "noise_multiplier": 1.0,
        "target_delta": 1e-5,
        "max_epsilon": 8.0,
        "max_grad_norm": 1.0,
        "sample_rate": 0.1,
        "expected_batch_size": 4.0,
    }
    problems = problems_of(run_of(privacy=privacy, steps=1, fused_update=True, sampled_layers=1))
    refused = " cannot be used under record-level privacy"
    assert {p.partition(refused)[0] for p in problems if refused in p} == {
        "training.fused_update",
        "training.sampled_layers",
    }


def test_what_needs_a_gpu_is_refused_by_name_before_anything_is_read() -> None:
    run = run_of(activation_offload=True, optimizer="paged-adamw8bit")
    assert problems_of(run) == []  # the run file is sound: another machine may have a GPU
    assert device_problems(run, cuda=True) == []
    lines = device_problems(run, cuda=False)
    assert [line.partition(":")[0] for line in lines] == ["training.activation_offload", "training.optimizer"]
    if not torch.cuda.is_available():
        missing = run.model_copy(update={"model": run.model.model_copy(update={"path": "./nowhere"})})
        with pytest.raises(RunFileError) as caught:
            load_simulated_run(missing)
        assert list(caught.value.problems) == lines
    grouped = build_run(
        {
            "run": {"name": "x", "rounds": 1},
            "groups": [{"clients": ["a"], "training": {"optimizer": "paged-adamw"}}],
        },
        source="test",
    )
    assert len(device_problems(grouped, cuda=False)) == 1


def test_too_many_layers_are_refused_when_the_model_is_known() -> None:
    with pytest.raises(TrainingError, match="sampled_layers is 9, and trained parameters lie in 4 layers"):
        load_simulated_run(run_of(sampled_layers=9))


@pytest.mark.gpu
def test_offloaded_activations_change_memory_only() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and to be asked for: pytest -m gpu")
    model = fresh().cuda()
    start = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    ends = []
    for offload in (False, True):
        for name, parameter in trainable_parameters(model).items():
            parameter.data.copy_(start[name])
        keys = section(activation_offload=offload)
        train(model, trainable_parameters(model), ROWS, keys, steps=2, rng=stream(0, "x"))
        ends.append(get_arrays(model))
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_every_saver_has_its_key() -> None:
    assert set(SAVERS) <= set(TrainingSection.model_fields)
