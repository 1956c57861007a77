"""From a measured scalar to a move: exactly along a direction, or through a dense optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import Batch
from fedpeft.errors import TrainingError
from fedpeft.seedspace.perturb import perturb
from fedpeft.spaces.base import Route
from fedpeft.training.first_order import Rows
from fedpeft.training.optimizers import OPTIMIZERS
from fedpeft.training.zeroth_hybrid import Above, above
from fedpeft.training.zeroth_prober import Prober
from fedpeft.training.zeroth_rules import MOMENTUM, RULES


class Mover(Protocol):
    """One rule at work on one client's parameters."""

    def look(self, batches: Sequence[Batch]) -> None:
        """A step's directions have been measured on these batches, and nothing has moved yet."""
        ...

    def step(self, direction: int, scalar: float, loss: Callable[[], float]) -> int:
        """Take one measured direction into account; how many quanta it moved, 0 where there is no quantum.

        Args:
            loss: the loss at the parameters as they are, for rules that look before they stay.
        """
        ...

    def close_step(self) -> None:
        """All directions of a step have been taken into account."""
        ...

    def finish(self) -> None:
        """Leave nothing behind on the parameters."""
        ...


def build_mover(target: Prober, rows: Rows, section: TrainingSection, route: Route) -> Mover:
    """The mover of the section's rule.

    Raises:
        TrainingError: a hybrid rule without first-order parameters.
    """
    rule = RULES[section.rule]
    if rule.dense is not None:
        return _dense(target, section, rule.dense)
    along = Along(target, section, route)
    return Hybrid(along, above(target, rows, section)) if rule.above else along


@dataclass(frozen=True)
class Along:
    """Moves along the direction itself, by whole quanta where the route has one."""

    target: Prober
    section: TrainingSection
    route: Route

    def look(self, batches: Sequence[Batch]) -> None:
        """Nothing: the scalars say all."""

    def step(self, direction: int, scalar: float, loss: Callable[[], float]) -> int:
        """Move at once: the quanta of one step commute, and all its scalars are measured already.

        Raises:
            TrainingError: more quanta than the route allows.
        """
        kind = RULES[self.section.rule].step
        share = self.section.lr / self.section.queries
        wanted = -share * (math.copysign(1.0, scalar) if kind == "sign" and scalar else scalar)
        length, amount = self._quantise(wanted)
        if kind == "best-of-three":
            sign = self._best(direction, length, loss)
            length, amount = sign * length, sign * amount
        self.target.move(direction, length)
        return amount

    def close_step(self) -> None:
        """Nothing is left to do."""

    def finish(self) -> None:
        """Nothing was left behind."""

    def _quantise(self, wanted: float) -> tuple[float, int]:
        if self.route.exponent is None:
            return wanted, 0
        amount = round(math.ldexp(wanted, -self.route.exponent))  # ties to even
        if abs(amount) > self.route.largest:
            raise TrainingError(
                f"a step of {amount} quanta came and {self.route.largest} is the agreed range; lower"
                " training.lr, set training.max_scalar, or set a larger space.quantum_exponent"
            )
        return math.ldexp(float(amount), self.route.exponent), amount

    def _best(self, direction: int, length: float, loss: Callable[[], float]) -> int:
        """1, 0 or -1: the candidate with the least loss, the earlier one of equals.

        Source: Zhang et al. 2024, ZO-SGD-Cons; the weights are put back from copies, not by subtraction.
        """
        kept = {name: parameter.detach().clone() for name, parameter in self.target.parameters.items()}
        losses = {0: loss()}
        for sign in (1, -1):
            self.target.move(direction, sign * length)
            losses[sign] = loss()
            for name, parameter in self.target.parameters.items():
                parameter.detach().copy_(kept[name])
        return min((1, 0, -1), key=lambda sign: losses[sign])


@dataclass(frozen=True)
class Hybrid:
    """Along the direction below a boundary, by gradients above it; both parts are taken at one point."""

    along: Along
    above: Above

    def look(self, batches: Sequence[Batch]) -> None:
        """Gradients for the upper part."""
        self.above.look(batches)

    def step(self, direction: int, scalar: float, loss: Callable[[], float]) -> int:
        """Move the lower part."""
        return self.along.step(direction, scalar, loss)

    def close_step(self) -> None:
        """Move the upper part."""
        self.above.step()

    def finish(self) -> None:
        """No gradient stays."""
        self.above.finish()


@dataclass(frozen=True)
class Dense:
    """Sums scalar times direction into gradients and leaves the rest to an optimiser of `torch.optim`."""

    target: Prober
    queries: int
    optimizer: torch.optim.Optimizer

    def look(self, batches: Sequence[Batch]) -> None:
        """Nothing: the scalars say all."""

    def step(self, direction: int, scalar: float, loss: Callable[[], float]) -> int:
        """Add to the gradient estimate."""
        for name, parameter in self.target.parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            perturb(
                self.target.stream,
                self.target.ids[name],
                direction,
                parameter.grad,
                scalar / self.queries,
                out=parameter.grad,
            )
        return 0

    def close_step(self) -> None:
        """One optimiser step."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """No gradient stays."""
        self.optimizer.zero_grad(set_to_none=True)


def _dense(target: Prober, section: TrainingSection, name: str) -> Dense:
    momentum = (section.momentum or MOMENTUM) if name == "sgd" else 0.0
    optimizer = OPTIMIZERS[name](
        list(target.parameters.values()), section.model_copy(update={"momentum": momentum})
    )
    return Dense(target, section.queries, optimizer)
