"""The first-order part of a hybrid step: gradients for what lies above the zeroth-order layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import Batch
from fedpeft.errors import TrainingError
from fedpeft.training.first_order import Rows
from fedpeft.training.losses import LOSSES
from fedpeft.training.optimizers import OPTIMIZERS
from fedpeft.training.zeroth_prober import Prober


@dataclass(frozen=True)
class Above:
    """The parameters that no direction moves, and their optimiser.

    Attributes:
        below: the others' values, without gradients: nothing under the boundary keeps its activations.
    """

    model: nn.Module
    rows: Rows
    parameters: Mapping[str, nn.Parameter]
    below: Mapping[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None

    def look(self, batches: Sequence[Batch]) -> None:
        """Gradients of the mean loss over all batches together at the weights as they are; no dropout."""
        device = next(self.model.parameters()).device
        scored = max(1, sum(batch.tokens for batch in batches))
        for batch in batches:
            inputs = {
                "input_ids": batch.input_ids.to(device),
                "attention_mask": batch.attention_mask.to(device),
            }
            with torch.enable_grad():
                logits = functional_call(self.model, dict(self.below), kwargs=inputs).logits
                loss = LOSSES[self.rows.task](logits, batch.labels.to(device)) / scored
            loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it so
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)

    def step(self) -> None:
        """One optimiser step."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """No gradient stays."""
        self.optimizer.zero_grad(set_to_none=True)


def above(probe: Prober, rows: Rows, section: TrainingSection) -> Above:
    """What the stream's support leaves out.

    Raises:
        TrainingError: directions move everything, so there is no first-order part.
    """
    support, first = probe.stream.support, torch.zeros(1, dtype=torch.int64)
    moved = {
        name: parameter.detach()
        for name, parameter in probe.parameters.items()
        if support is None or bool(support.moves(probe.ids[name], first))
    }
    parameters = {name: part for name, part in probe.parameters.items() if name not in moved}
    if not parameters:
        raise TrainingError("a hybrid step needs first-order parameters too; lower training.layers_below")
    lr = section.lr if section.lr_above is None else section.lr_above
    optimizer = OPTIMIZERS[section.optimizer](
        list(parameters.values()), section.model_copy(update={"lr": lr})
    )
    return Above(probe.model, rows, parameters, moved, optimizer, section.max_grad_norm)
