"""The frozen part that some rules keep beside the factors: its names in a state.

A module ``x`` with factors ``x.lora_A.default.weight`` and ``x.lora_B.default.weight`` has the frozen product
``x.residual_B @ x.residual_A`` (m x K, K x n, float32, scaling 1), of a rank K that changes from round to
round. Modules without one have no such names.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.updates.low_rank import LoraFactors
from fedpeft.updates.update import Arrays

RESIDUAL_A, RESIDUAL_B = ".residual_A", ".residual_B"


def is_residual(name: str) -> bool:
    """Whether a state's array is one of the frozen part."""
    return name.endswith((RESIDUAL_A, RESIDUAL_B))


def residuals_of(state: Arrays) -> dict[str, LoraFactors]:
    """Module to its frozen part.

    Raises:
        UpdateError: half of one, or factors that don't fit each other.
    """
    found = {}
    for name in state:
        if name.endswith(RESIDUAL_A):
            module = name.removesuffix(RESIDUAL_A)
            if module + RESIDUAL_B not in state:
                raise UpdateError(f"{name!r} came without {module + RESIDUAL_B!r}: both factors are needed")
            found[module] = LoraFactors(state[name], state[module + RESIDUAL_B], 1.0)
    return found


def residual_arrays(residuals: Mapping[str, LoraFactors]) -> dict[str, NDArray[np.float32]]:
    """Inverse of `residuals_of`."""
    arrays = {}
    for module, factors in residuals.items():
        arrays[module + RESIDUAL_A] = factors.a.astype(np.float32)
        arrays[module + RESIDUAL_B] = factors.b.astype(np.float32)
    return arrays
