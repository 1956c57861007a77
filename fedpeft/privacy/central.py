"""Client-level privacy at the server: an exact sum of clipped updates, noise in its quanta, one release.

The server is trusted with the clients' updates; whoever sees the models is not. Everything that is added is a
whole number of quanta (`fedpeft.aggregation.exact_sum.ExactSum`), the noise too, and the sensitivity prices
the rounding to quanta. Nothing that depends on who came leaves: the sum is divided by the cohort that was
*expected*, and neither the realised cohort, nor weights, losses or row counts belong into what is published.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.aggregation.exact_sum import HEADROOM_BITS, ExactSum
from fedpeft.config.sections import FederationSection
from fedpeft.errors import PrivacyError, UpdateError
from fedpeft.privacy.clipping import AdaptiveClipping, check_clip_norm, clip
from fedpeft.privacy.discrete_gaussian import discrete_gaussian
from fedpeft.privacy.events import ClientLevel
from fedpeft.privacy.noise import NoiseSource, coins
from fedpeft.updates.update import Layout, Update

NOISE_REACH = 40.0  # standard deviations that int64 must have room for; beyond lies less than exp(-800)


@dataclass(frozen=True, kw_only=True)
class CentralMechanism:
    """What the run file promises about client-level privacy.

    Attributes:
        clip_norm: bound on one update's L2 norm; the first one under adaptive clipping.
        noise_multiplier: what a round costs: noise over sensitivity, the bits of adaptive clipping included.
        sample_rate: each client's chance to be asked; 1 without sampling.
        clients: how many could be asked, which fixes the expected cohort.
        max_weight: largest weight of an update; 1 is uniform weighting. Larger weights are cut to it. The
            sensitivity grows with it and so does what the sum is divided by.
    """

    clip_norm: float
    noise_multiplier: float
    sample_rate: float
    clients: int
    max_weight: int = 1

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        if self.clients < 1 or self.max_weight < 1:
            raise PrivacyError(
                f"{self.clients} clients and max_weight {self.max_weight} came; both must be at least 1"
            )
        self.event()

    @property
    def expected_cohort(self) -> float:
        """Sample rate times clients: public, and the divisor of every round."""
        return self.sample_rate * self.clients

    def event(self) -> ClientLevel:
        """What one round releases."""
        return ClientLevel(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)


@dataclass(frozen=True)
class Release:
    """What may be seen of a round.

    Attributes:
        mean: noised sum over expected cohort (and largest weight), float64 by name.
        event: what it cost.
        noise_std: of each entry of `mean`.
        clipping: the next round's state under adaptive clipping.
    """

    mean: dict[str, NDArray[np.float64]]
    event: ClientLevel
    noise_std: float
    clipping: AdaptiveClipping | None


class PrivateSum:
    """One round's sum: `fold` what the cohort sends, then `release` once.

    Floats and whole numbers (a vector of K seed-scalars, whose quantum is 1) go the same way; noise has as
    many dimensions as the update has entries.

    Args:
        layout: of an update.
        cohort: who was asked, drawn by `poisson_cohort`.
        quantum_exponent: log2 of the unit in which float entries are counted.
        clipping: adaptive clipping's state; its bound replaces the mechanism's.
    """

    def __init__(
        self,
        mechanism: CentralMechanism,
        layout: Layout,
        cohort: Collection[str],
        *,
        quantum_exponent: int,
        clipping: AdaptiveClipping | None = None,
    ) -> None:
        self._mechanism = mechanism
        self._clipping = clipping
        self._clip_norm = mechanism.clip_norm if clipping is None else clipping.clip_norm
        self._cohort = frozenset(cohort)
        self._within: dict[str, bool] = {}
        self._closed = False
        integral = any(np.dtype(dtype).kind in "iu" for _, dtype in layout.values())
        self._exponent = 0 if integral else quantum_exponent
        size = sum(math.prod(shape) for shape, _ in layout.values())
        self._sensitivity = sensitivity_quanta(self._clip_norm, self._exponent, 0 if integral else size)
        if len(self._cohort) > mechanism.clients:
            raise PrivacyError(
                f"{len(self._cohort)} clients were asked and the mechanism knows {mechanism.clients}; a"
                " cohort is drawn from the run's clients"
            )
        # Capacity for all clients, whatever the coins showed, so that no refusal depends on the cohort.
        self._sum = ExactSum(layout, quantum_exponent=quantum_exponent, capacity=mechanism.clients)
        self._check_room()

    def fold(self, client: str, update: Update) -> None:
        """Clip and add one client's update; what is refused adds nothing, which is within the bound as well.

        Raises:
            PrivacyError: the round is released, the client wasn't asked, or has been counted.
            UpdateError: wrong layout, NaN or infinity, or a weight below 1.
        """
        if self._closed:
            raise PrivacyError(f"{client}: the round is released; what comes later counts in no round")
        if client not in self._cohort:
            raise PrivacyError(
                f"{client}: not asked in this round; amplification by sampling holds only for those whom the"
                " server's secret coins chose"
            )
        if client in self._within:
            raise PrivacyError(f"{client}: counted already; one client adds one update to a round")
        if update.weight < 1:
            raise UpdateError(f"{client}: weight {update.weight} came, at least 1 is needed")
        clipped = clip(update, self._clip_norm)
        weight = min(update.weight, self._mechanism.max_weight)
        self._sum.fold(replace(clipped.update, weight=weight), who=client)
        self._within[client] = clipped.within

    def release(self, source: NoiseSource) -> Release:
        """Add noise and divide by what was expected; also of a round in which nobody came.

        Raises:
            PrivacyError: released already: a second draw over the same sum would be a second, unpaid release.
        """
        if self._closed:
            raise PrivacyError("the round is released already; a second draw would cost again")
        self._closed = True
        std = self._noise_quanta()
        divisor = self._mechanism.expected_cohort * self._mechanism.max_weight
        mean = {
            name: np.ldexp((total + noise_like(source, std, total)).astype(np.float64), self._exponent)
            / divisor
            for name, total in self._sum.sums().items()
        }
        return Release(
            mean=mean,
            event=self._mechanism.event(),
            noise_std=math.ldexp(std, self._exponent) / divisor,
            clipping=self._next_clipping(source),
        )

    def _noise_quanta(self) -> float:
        z = self._mechanism.noise_multiplier
        if self._clipping is not None:
            z = self._clipping.update_multiplier(z)
        return z * self._sensitivity * self._mechanism.max_weight

    def _next_clipping(self, source: NoiseSource) -> AdaptiveClipping | None:
        if self._clipping is None:
            return None
        expected = self._mechanism.expected_cohort
        return self._clipping.next(self._clipping.noisy_fraction(self._within, expected, source))

    def _check_room(self) -> None:
        """Refuse, before anything came, what could overflow int64 or be refused for its size later."""
        reach = self._sensitivity * self._mechanism.max_weight
        if reach * self._mechanism.clients > 2.0**HEADROOM_BITS / 2 or (
            NOISE_REACH * self._noise_quanta() > 2.0**HEADROOM_BITS
        ):
            raise PrivacyError(
                f"clip_norm {self._clip_norm:g} times max_weight {self._mechanism.max_weight} for"
                f" {self._mechanism.clients} clients is 2^{math.log2(reach):.1f} quanta each and does not"
                " fit 64 bits with its noise; raise federation.quantum_exponent"
            )


def sensitivity_quanta(clip_norm: float, quantum_exponent: int, rounded_entries: int) -> float:
    """How far, in quanta, one clipped update can lie from zero once its entries are rounded to whole quanta.

    Rounding moves each entry by at most half a quantum, hence the vector by half the root of their number.

    Args:
        rounded_entries: entries that get rounded; 0 for updates that are whole numbers already.
    """
    exact = math.ldexp(clip_norm, -quantum_exponent)
    # One part in 2**40 covers this line's rounding and that of the norm's float64 sum.
    return (exact + 0.5 * math.sqrt(rounded_entries)) * (1.0 + 2.0**-40)


def noise_like(source: NoiseSource, std: float, integers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Discrete Gaussian noise in the shape of `integers`."""
    return discrete_gaussian(source, std, integers.size).reshape(integers.shape)


def poisson_cohort(source: NoiseSource, clients: Sequence[str], sample_rate: float) -> list[str]:
    """Each client by its own secret coin, sorted; may be empty.

    Drawn from a noise source and not from the run's seed, which clients know: sampling that the observer can
    recompute amplifies nothing.
    """
    names = sorted(clients)
    heads = coins(source, sample_rate, len(names))
    return [name for name, head in zip(names, heads, strict=True) if head]


def sample_rate_of(federation: FederationSection, *, max_weight: int | None = None) -> float:
    """The sample rate that a run file's federation may claim.

    Args:
        max_weight: the public largest weight, where weights are priced into the sensitivity.

    Raises:
        PrivacyError: sampling whose amplification isn't proven under adding and removing a client, a cohort
            that depends on who answers first, or weights that are private.
    """
    problems = federation_problems(federation, max_weight=max_weight)
    if problems:
        raise PrivacyError(problems[0])
    sampling = federation.sampling
    return 1.0 if sampling.kind == "all" else float(sampling.rate or 0.0)


def federation_problems(federation: FederationSection, *, max_weight: int | None = None) -> list[str]:
    """Why a run file's federation may claim no sample rate, one line each; see `sample_rate_of`."""
    sampling, problems = federation.sampling, []
    if sampling.kind not in ("poisson", "all"):
        problems.append(
            f"federation.sampling '{sampling.kind}' draws cohorts of one size, and client-level privacy is"
            " accounted for Poisson sampling; set sampling = { kind = 'poisson', rate = ... } or 'all'"
        )
    if federation.over_selection > 0.0:
        problems.append(
            f"federation.over_selection is {federation.over_selection:g}: the first to answer choose"
            " themselves, which voids amplification by sampling; set it to 0"
        )
    if federation.weighting != "uniform" and max_weight is None:
        problems.append(
            "federation.weighting 'examples' makes weights private and the sensitivity unknown; set"
            " 'uniform', or privacy.max_weight, which every client's is cut to"
        )
    if federation.weighting == "uniform" and max_weight is not None:
        problems.append(
            "privacy.max_weight: with federation.weighting 'uniform' all weights are 1; remove one of the two"
        )
    return problems
