"""The virtual clock: who is there, who is slow and who vanishes, all drawn from the run's seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedpeft.config.sections import ClockSection
from fedpeft.runtime.randomness import stream


@dataclass(frozen=True)
class SimulatedArrival:
    """What the clock has in store for one asked client in one round.

    Attributes:
        arrives_s: virtual seconds from the round's start until its answer is complete; infinite if it
            vanishes.
    """

    arrives_s: float

    @property
    def vanishes(self) -> bool:
        """It was asked and will never answer."""
        return math.isinf(self.arrives_s)


class VirtualClock:
    """Draws depend on the client's name and the round only, never on who else is asked."""

    def __init__(self, section: ClockSection, seed: int) -> None:
        self._section = section
        self._seed = seed

    def available(self, client: str, round_: int) -> bool:
        """Whether the client can be asked in this round."""
        return bool(stream(self._seed, "availability", client, round_).random() < self._section.availability)

    def examples_per_s(self, client: str) -> float:
        """The client's speed for the whole run: lognormal with median `examples_per_s`."""
        sigma = self._section.speed_sigma
        return self._section.examples_per_s * math.exp(
            sigma * float(stream(self._seed, "speed", client).standard_normal())
        )

    def fate(
        self, client: str, round_: int, *, examples: int, bytes_down: int, bytes_up: int
    ) -> SimulatedArrival:
        """When the client's answer arrives: latency, transfer both ways, and training."""
        if stream(self._seed, "dropout", client, round_).random() < self._section.dropout:
            return SimulatedArrival(math.inf)
        transfer = (bytes_down + bytes_up) / self._section.bytes_per_s
        return SimulatedArrival(self._section.latency_s + transfer + examples / self.examples_per_s(client))
