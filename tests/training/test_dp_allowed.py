"""The allow-list, proven: per-example gradients of every combination against one row at a time."""

from __future__ import annotations

import pytest
import torch

from fedpeft.config import PeftSection
from fedpeft.errors import PrivacyError
from fedpeft.models.attach import attach
from fedpeft.models.methods import METHODS
from fedpeft.models.trainable import trainable_parameters
from fedpeft.training.dp_allowed import ALLOWED, REFUSED, check_allowed
from fedpeft.training.dp_oracle import TOLERANCE, verify_per_example
from fedpeft.training.dp_sgd import example_gradients, per_example
from tests.models.tiny import LABELS, TASKS, VOCABULARY, tiny_base
from tests.training.rows import attached, norm, rows_for, single_gradients, still

PROVEN = 2e-6  # of a row's whole gradient; float32 sums in another order
KINDS = {  # tiny model -> its place in the table
    "llama": ("llama", "causal-lm"),
    "llama-classifier": ("llama", "sequence-classification"),
    "bert": ("bert", "sequence-classification"),
}
CASES = [(method, kind) for kind, place in KINDS.items() for method in sorted(ALLOWED[place])]
# Refused combinations that attach and train without privacy: each must fail the model's own check as well.
WRONG = [
    ("prompt", "llama"),
    ("p-tuning", "llama"),
    ("prompt", "bert"),
    ("ia3", "llama"),
    ("vera", "bert"),
    ("oft", "bert"),
    ("dora", "llama"),
    ("full", "bert"),
]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_per_example_gradients_are_those_of_single_rows(method: str, kind: str) -> None:
    model = still(attached(method, kind))
    parameters, rows = trainable_parameters(model), rows_for(kind)
    wanted = [single_gradients(model, parameters, rows, int(i)) for i in rows.indices]
    with per_example(model, parameters) as hooked:
        got = {n: g.clone() for n, g in example_gradients(hooked, parameters, rows, rows.indices).items()}
    worst = max(
        float((got[name][i] - single[name]).double().norm()) / norm(single)
        for i, single in enumerate(wanted)
        for name in parameters
    )
    assert min(norm(single) for single in wanted) > 1e-3
    assert worst < PROVEN


def test_every_place_of_the_table_is_proven() -> None:
    assert set(KINDS.values()) == ALLOWED.keys()
    assert len(CASES) == 30
    assert {kind: tiny_base(kind).config.model_type for kind in KINDS} == {  # type: ignore[union-attr]
        kind: place[0] for kind, place in KINDS.items()
    }
    assert all(TASKS[kind] == place[1] for kind, place in KINDS.items())
    assert {method for methods in ALLOWED.values() for method in methods} | REFUSED.keys() <= METHODS.keys()


@pytest.mark.parametrize(
    ("method", "kind"), [("lora", "llama"), ("bitfit", "bert"), ("prefix", "llama-classifier")]
)
def test_the_models_own_check_agrees_and_leaves_it_as_it_was(method: str, kind: str) -> None:
    model = attached(method, kind)
    parameters = trainable_parameters(model)
    flags = [module.training for module in model.modules()]
    error = verify_per_example(model, parameters, rows_for(kind).task, vocabulary=VOCABULARY, labels=LABELS)
    assert 0.0 <= error < PROVEN
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules() if hasattr(module, "activations"))


@pytest.mark.parametrize(("method", "kind"), WRONG)
def test_the_models_own_check_finds_what_opacus_lets_pass(method: str, kind: str) -> None:
    model = attached(method, kind)
    parameters, task = trainable_parameters(model), rows_for(kind).task
    with pytest.raises(PrivacyError, match="record-level privacy") as caught:
        verify_per_example(model, parameters, task, vocabulary=VOCABULARY, labels=LABELS)
    assert "\n" not in str(caught.value)


def test_the_check_finds_rows_that_couple() -> None:
    """A layer that subtracts the batch's mean passes Opacus's validation; the gradients are wrong."""

    class Coupled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(hidden)
            return out - 0.5 * out.mean(dim=0, keepdim=True)

    model = attach(tiny_base("bert"), PeftSection(method="head"), task=TASKS["bert"], seed=1)
    model.base_model.model.bert.pooler.dense = Coupled(model.base_model.model.bert.pooler.dense)  # type: ignore
    with pytest.raises(PrivacyError, match="off by"):
        verify_per_example(
            model,
            trainable_parameters(model),
            "sequence-classification",
            vocabulary=VOCABULARY,
            labels=LABELS,
        )
    assert TOLERANCE < 1e-3


@pytest.mark.parametrize(
    ("method", "architecture", "task", "quantization", "says"),
    [
        ("prompt", "llama", "causal-lm", "none", "virtual tokens"),
        ("ia3", "llama", "causal-lm", "none", "outside their own layer"),
        ("full", "bert", "sequence-classification", "none", "position embeddings"),
        ("lora", "mamba", "causal-lm", "none", "mamba model"),
        ("lora", "bert", "causal-lm", "none", "bert model for causal-lm"),
        ("lora", "llama", "causal-lm", "int8", "int8"),
    ],
)
def test_refusals_say_why(method: str, architecture: str, task: str, quantization: str, says: str) -> None:
    with pytest.raises(PrivacyError, match=says) as caught:
        check_allowed(method, architecture, task, quantization=quantization)
    assert "\n" not in str(caught.value)


def test_what_is_proven_is_allowed() -> None:
    for (architecture, task), methods in ALLOWED.items():
        for method in methods:
            check_allowed(method, architecture, task)
