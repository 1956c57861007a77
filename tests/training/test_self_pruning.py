"""Self-pruning: the penalty's gradient, when ranks go, and that what went stays away, in whole runs too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.sections import PruningSection
from fedpeft.ledger.checkpoint import read_checkpoint
from fedpeft.ledger.records import Round, parse_row
from fedpeft.models.trainable import trainable_parameters
from fedpeft.planning.preflight import problems_of
from fedpeft.runtime.randomness import stream
from fedpeft.training.first_order import train
from fedpeft.training.self_pruning import SelfPruning, self_pruning
from tests.simulation.runs import fingerprint, simulated
from tests.training.rows import attached, rows_for

RANK = 8  # of `peft` where nobody says otherwise


def pruning(model: nn.Module, rank: int | None = None, **keys: float) -> SelfPruning:
    return self_pruning(trainable_parameters(model), PruningSection(**{"keep": 0.7, **keys}), rank)


def test_the_gradient_is_that_of_the_penalty() -> None:
    model = attached("lora", "llama")
    mine = pruning(model, 6, penalty=0.3)
    assert (mine.rank_after_shrinking, len(mine.pairs)) == (4, 14)
    penalty = 0.3 * sum(b[:, 4:6].norm() * a[4:6].norm() for a, b in mine.pairs)
    parameters = list(trainable_parameters(model).values())
    wanted = torch.autograd.grad(penalty, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    mine.add_gradient()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 1 + gradient)
    assert mine.size() == pytest.approx(float(penalty.detach()) / 0.3, rel=1e-5)


def test_a_factor_that_is_zero_or_rests_is_left_alone() -> None:
    model = attached("lora", "llama")
    mine = pruning(model)
    a, b = mine.pairs[0]
    with torch.no_grad():
        b.zero_()
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    mine.add_gradient()
    assert not a.grad.any()
    assert not b.grad.any()
    assert mine.pairs[1][0].grad is None


def test_ranks_go_only_where_they_shrank_and_never_all() -> None:
    mine = pruning(attached("lora", "llama"), 6)
    size = mine.size()
    assert mine.after(size) == 6
    assert mine.after(size * 1.001) == 4
    assert all(not a[4:].any() and not b[:, 4:].any() for a, b in mine.pairs)
    assert all(a[:4].all() and b[:, :4].all() for a, b in mine.pairs)
    last = pruning(attached("lora", "llama"), 1)
    assert last.after(1e9) == last.rank_after_shrinking == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_given_up_ranks_stay_zero_through_training(optimizer: str) -> None:
    model = attached("lora", "llama")
    mine = pruning(model, 3, penalty=0.1)
    mine.clear()
    section = build_run(
        {
            "run": {"name": "x", "rounds": 1},
            "training": {"optimizer": optimizer, "lr": 1e-2, "weight_decay": 0.1},
        },
        source="test",
    ).training
    train(
        model,
        trainable_parameters(model),
        rows_for("llama"),
        section,
        steps=3,
        rng=stream(0, "x"),
        proximal_mu=0.1,
        add_gradient=mine.add_gradient,
    )
    assert all(not a[3:].any() and not b[:, 3:].any() for a, b in mine.pairs)
    assert all(a[:3].all() for a, _ in mine.pairs)


def tables(folder: Path) -> dict[str, Any]:
    rows = [{"prompt": f"say {i}\n", "answer": str(i)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": "pruned", "rounds": 3},
        "peft": {"method": "lora", "r": RANK},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "heldout": 0.0,
            "partitioner": {"kind": "iid", "clients": 3},
        },
        "training": {"steps": 3, "batch_size": 4, "lr": 0.5, "optimizer": "sgd"},
        "federation": {"lora_rule": "hetlora", "self_pruning": {"keep": 0.7, "penalty": 1.0}},
        "groups": [{"clients": ["client-2"], "peft": {"r": 3, "lora_alpha": 3}}],
        "evaluation": {"bootstrap": 2, "metrics": ["loss"], "every": 9},
    }


def test_clients_of_a_run_give_up_ranks_and_remember_it(tmp_path: Path) -> None:
    run = tables(tmp_path)
    simulated(run, tmp_path / "run")
    rows = [parse_row(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    ranks = [
        {outcome.client: outcome.rank for outcome in row.outcomes}
        for row in rows
        if isinstance(row, Round) and row.round
    ]
    # B begins at zero, so that nothing can shrink in the first round.
    assert ranks[0] == {"client-0": RANK, "client-1": RANK, "client-2": 3}
    assert ranks[1] == {"client-0": 5, "client-1": 5, "client-2": 2}
    assert ranks[2] == {"client-0": 3, "client-1": 3, "client-2": 1}
    path = tmp_path / "run" / "checkpoints" / "round-000003.safetensors"
    state = read_checkpoint(path, run_digest(build_run(run, source="test"))).state
    for name, array in state.items():
        factor = array if ".lora_A." in name else array.T
        assert np.abs(factor[:3]).max() > 0
        assert not factor[3:].any(), "nobody holds these ranks any more"
    simulated(run, tmp_path / "again", workers=2)
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"federation": {"lora_rule": "fedit", "self_pruning": {}}}, "belongs to lora_rule 'hetlora'"),
        ({"training": {"kind": "zeroth-order", "steps": 1}}, "only training.kind 'first-order'"),
        ({"training": {"fused_update": True, "optimizer": "sgd"}}, "needs all gradients"),
        (
            {"privacy": {"kind": "local", "clip_norm": 1.0, "noise_multiplier": 1.0, "max_epsilon": 9.0}},
            "tells about its rows",
        ),
    ],
)
def test_what_does_not_go_together_is_said_by_name(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if "privacy" in changed:
        changed["privacy"]["target_delta"] = 1e-5
    problems = problems_of(build_run({**tables(tmp_path), **changed}, source="test"))
    assert [line for line in problems if said in line]
