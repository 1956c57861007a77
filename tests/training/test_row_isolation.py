"""Does a model keep anything from one row to the next: methods pass, a layer that remembers does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpeft.config.sections import PeftSection, TrainingSection
from fedpeft.errors import PrivacyError
from fedpeft.models.attach import attach
from fedpeft.models.trainable import trainable_parameters
from fedpeft.training.row_isolation import verify_gradients_apart, verify_losses_apart
from tests.models.tiny import LABELS, TASKS, VOCABULARY, tiny_base
from tests.training.rows import attached, rows_for

SECTION = TrainingSection()


def verify(model: nn.Module, kind: str) -> float:
    parameters, task = trainable_parameters(model), rows_for(kind).task
    sizes = {"vocabulary": VOCABULARY, "labels": LABELS}
    return max(
        verify_gradients_apart(model, parameters, SECTION, task, **sizes),
        verify_losses_apart(model, task, **sizes),
    )


@pytest.mark.parametrize(
    ("method", "kind"),
    [("lora", "llama"), ("bitfit", "bert"), ("prompt", "llama"), ("full", "bert"), ("oft", "bert")],
)
def test_rows_are_apart_and_the_model_is_left_as_it_was(method: str, kind: str) -> None:
    """Also methods whose gradients per row cannot be told from those of a batch."""
    model = attached(method, kind)
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert verify(model, kind) == 0.0
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


class Remembers(nn.Module):
    """Subtracts the mean of what came before."""

    def __init__(self, inner: nn.Module, buffer: bool) -> None:
        super().__init__()
        self.inner = inner
        if buffer:
            self.register_buffer("mean", torch.zeros(()))
        else:
            self.mean = torch.zeros(())

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        before, self.mean = self.mean, out.detach().mean()
        return out - before


def with_pooler(layer: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A classifier whose pooler is made anew of the old one."""
    model: Any = attach(tiny_base("bert"), PeftSection(method="head"), task=TASKS["bert"], seed=1)
    pooler = model.base_model.model.bert.pooler
    pooler.dense = layer(pooler.dense)
    whole: nn.Module = model
    return whole


@pytest.mark.parametrize("buffer", [False, True], ids=["in an attribute", "in a buffer"])
def test_a_layer_that_remembers_rows_is_found(buffer: bool) -> None:
    """Whichever trainer looks."""
    sizes, task = {"vocabulary": VOCABULARY, "labels": LABELS}, rows_for("bert").task
    looks: tuple[Callable[[nn.Module], float], ...] = (
        lambda model: verify_gradients_apart(model, trainable_parameters(model), SECTION, task, **sizes),
        lambda model: verify_losses_apart(model, task, **sizes),
    )
    for look in looks:
        with pytest.raises(PrivacyError, match="rows one by one") as caught:
            look(with_pooler(lambda dense: Remembers(dense, buffer)))
        assert "\n" not in str(caught.value)


def test_statistics_over_rows_are_not_kept() -> None:
    """A layer that normalises by running statistics uses the base model's, as in evaluation."""
    model = with_pooler(lambda dense: nn.Sequential(dense, nn.BatchNorm1d(32, affine=False)))
    assert verify(model, "bert") == 0.0


class Fails(nn.Module):
    """A layer that cannot take one row."""

    def forward(self, hidden: Tensor) -> Tensor:
        raise ValueError("needs two rows")


def test_a_model_that_fails_on_one_row_is_refused() -> None:
    with pytest.raises(PrivacyError, match="fails on one row alone"):
        verify(with_pooler(lambda _: Fails()), "bert")
