"""Who is asked in a round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedpeft.config.sections import SamplingSection
from fedpeft.errors import FederationError


def cohort_size(section: SamplingSection, clients: int) -> int:
    """Clients wanted per round (the expectation, rounded, for Poisson sampling).

    Raises:
        FederationError: a fixed cohort larger than the number of clients.
    """
    if section.kind == "fixed":
        wanted = section.cohort or 0
        if wanted > clients:
            raise FederationError(
                f"federation.sampling.cohort is {wanted} and there are {clients} clients;"
                f" lower the cohort or bring {wanted - clients} more clients"
            )
        return wanted
    share = {"all": 1.0, "fraction": section.fraction, "poisson": section.rate}[section.kind]
    return max(1, round(clients * float(share or 0.0)))


def sample_cohort(
    section: SamplingSection,
    available: Sequence[str],
    total: int,
    rng: np.random.Generator,
    over_selection: float = 0.0,
) -> list[str]:
    """Draw the clients to ask, in sorted order.

    Args:
        available: names that can be asked now.
        total: all clients of the run, which shares and rates refer to.
        rng: this round's stream.
        over_selection: ask ``ceil((1 + over_selection) * cohort)`` clients, as far as there are so many.
            Poisson
            sampling takes none: privacy amplification needs each client's own coin.

    Returns:
        Sorted names; may be empty under Poisson sampling.
    """
    names = sorted(available)
    if section.kind == "poisson":
        coins = rng.random(len(names))
        return [name for name, coin in zip(names, coins, strict=True) if coin < float(section.rate or 0.0)]
    wanted = math.ceil(cohort_size(section, total) * (1.0 + over_selection))
    if wanted >= len(names):
        return names
    chosen = rng.choice(len(names), size=wanted, replace=False)
    return sorted(names[index] for index in chosen)
