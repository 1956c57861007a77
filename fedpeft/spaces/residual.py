"""The plain space, with a frozen low-rank part in the state that rounds add to and nobody trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.aggregation.lora_rules import is_residual, residuals_of
from fedpeft.models.frozen_products import FrozenProducts
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.spaces.base import Memory, Parameters, Route, Trail
from fedpeft.updates.update import Arrays, Layout, freeze_arrays


class ResidualSpace:
    """State: every trainable parameter, and the frozen products that there are. Update: as `AdapterDelta`.

    A change moves parameters; frozen products that it names take the place of the state's.

    Args:
        model: with LoRA layers.
    """

    kind = AdapterDelta.kind

    def __init__(self, model: nn.Module) -> None:
        self._plain = AdapterDelta()
        self._products = FrozenProducts(model)

    def facts(self) -> Mapping[str, str]:
        """That the state grows."""
        return {"frozen products": "in the state, of a rank that grows"}

    def example(self, state: Arrays, visits: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        """As without frozen products, of which nobody knows the rank beforehand."""
        return self._plain.example(_select_trained(state), visits, rng)

    def example_step(self, state: Arrays, updates: Sequence[Arrays], rng: np.random.Generator) -> None:
        """States travel whole."""

    def replay_s(self) -> None:
        """The state is the weights."""

    def initial_state(self, parameters: Parameters) -> Arrays:
        """The trainable parameters; no product."""
        return self._plain.initial_state(parameters)

    def enter(self, parameters: Parameters, state: Arrays) -> None:
        """Parameters and products as the state has them."""
        self._products.write(residuals_of(state))
        self._plain.enter(parameters, _select_trained(state))

    def route(self, state: Arrays, visits: int, rng: np.random.Generator) -> Route:
        """As `AdapterDelta`."""
        return self._plain.route(state, visits, rng)

    def express(
        self,
        parameters: Parameters,
        state: Arrays,
        trail: Trail | None = None,
        memory: Memory | None = None,
    ) -> Arrays:
        """As `AdapterDelta`; nothing is said of the products."""
        return self._plain.express(parameters, _select_trained(state), trail, memory)

    def update_layout(self, state: Layout) -> Layout:
        """That of the parameters."""
        return {name: entry for name, entry in state.items() if not is_residual(name)}

    def sum_layout(self, state: Layout) -> Layout:
        """That of the parameters."""
        return self.update_layout(state)

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """Itself."""
        return arrays

    def check(self, arrays: Arrays, *, state: Arrays, who: str) -> None:
        """As `AdapterDelta`."""

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """Parameters plus their change; products replaced where the change has them."""
        moved = self._plain.apply(
            _select_trained(state), {n: a for n, a in change.items() if not is_residual(n)}
        )
        products = {name: array for name, array in state.items() if is_residual(name)}
        products |= {name: array.astype(np.float32) for name, array in change.items() if is_residual(name)}
        return freeze_arrays({**moved, **products}) if products else moved


def _select_trained(state: Arrays) -> Arrays:
    """The state without its products; itself if it has none."""
    if not any(is_residual(name) for name in state):
        return state
    return {name: array for name, array in state.items() if not is_residual(name)}
