"""A model as zeroth-order trainers see it: evaluated beside its weights, and moved along directions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpeft.data.collate import Batch
from fedpeft.seedspace.jit_perturb import JustInTime
from fedpeft.seedspace.layout import CounterStream, tensor_ids
from fedpeft.seedspace.perturb import perturb
from fedpeft.seedspace.trainable_tensors import trainable_parameters
from fedpeft.training.first_order import Rows
from fedpeft.training.losses import PRECISE_LOSSES, SCORED_LOSSES

Value = TypeVar("Value")


@dataclass(frozen=True)
class Prober:
    """A model that can be evaluated beside its weights and moved along directions.

    Attributes:
        parameters: trainable, by canonical name, which is what tensor ids are ranks of.
    """

    model: nn.Module
    stream: CounterStream
    parameters: Mapping[str, nn.Parameter]
    ids: Mapping[str, int]
    nearby: JustInTime

    def evaluate(
        self,
        batches: Sequence[Batch],
        read: Callable[[Tensor, Tensor], Value],
        direction: int = 0,
        scale: float = 0.0,
    ) -> list[Value]:
        """What `read` makes of (logits, labels) of each batch at theta + scale * z."""
        device = next(self.model.parameters()).device
        found = []
        with torch.no_grad(), self.nearby.at(direction, scale):
            for batch in batches:
                logits = self.model(
                    input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
                ).logits
                found.append(read(logits, batch.labels.to(device)))
        return found

    def loss(self, batches: Sequence[Batch], rows: Rows, direction: int = 0, scale: float = 0.0) -> float:
        """Mean loss at theta + scale * z, nats per scored token (or class), over all batches together."""
        losses = self.evaluate(batches, PRECISE_LOSSES[rows.task], direction, scale)
        return sum(losses) / max(1, sum(batch.tokens for batch in batches))

    def tangent(self, batches: Sequence[Batch], rows: Rows, direction: int) -> tuple[float, float]:
        """Mean loss at theta and its derivative along z, by forward-mode differentiation: no radius, no bias.

        z is held as a whole, and every activation beside its derivative. Both sums are float64 over the
        tokens' float32 values.

        Raises:
            RuntimeError: an operation of the model has no forward-mode derivative.
        """
        device = next(self.model.parameters()).device
        total, slope = 0.0, 0.0
        # Of torch's attention kernels only the plain one has a forward-mode derivative.
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = self._duals(direction)
            for batch in batches:
                inputs = {
                    "input_ids": batch.input_ids.to(device),
                    "attention_mask": batch.attention_mask.to(device),
                }
                logits = functional_call(self.model, duals, kwargs=inputs).logits
                losses = SCORED_LOSSES[rows.task](logits, batch.labels.to(device))
                primal, tangent = forward_ad.unpack_dual(losses)  # type: ignore[no-untyped-call]  # torch's
                total += float(primal.double().sum())
                slope += 0.0 if tangent is None else float(tangent.double().sum())
        scored = max(1, sum(batch.tokens for batch in batches))
        return total / scored, slope / scored

    def _duals(self, direction: int) -> dict[str, Tensor]:
        """Each parameter with z as its derivative; tied weights follow by themselves."""
        duals = {}
        for name, parameter in self.parameters.items():
            z = perturb(self.stream, self.ids[name], direction, torch.zeros_like(parameter), 1.0)
            with warnings.catch_warnings():  # torch compiles its own rules at the first use, in an old way
                warnings.simplefilter("ignore", DeprecationWarning)
                dual = forward_ad.make_dual(parameter.detach(), z)  # type: ignore[no-untyped-call]  # torch's
            duals[name] = dual
        return duals

    def move(self, direction: int, length: float) -> None:
        """Theta += length * z, in place."""
        for name, parameter in self.parameters.items():
            weights = parameter.detach()
            perturb(self.stream, self.ids[name], direction, weights, length, out=weights)


def prober(model: nn.Module, stream: CounterStream) -> Prober:
    """Prepare a model; nothing of it is copied."""
    parameters = trainable_parameters(model)
    ids = tensor_ids(parameters)
    return Prober(model, stream, parameters, ids, JustInTime(model, ids, stream))
