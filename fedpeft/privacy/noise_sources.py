"""Which noise source a run draws from, and the door that simulated noise does not pass."""

from __future__ import annotations

from fedpeft.config.sections import RunConfig
from fedpeft.errors import PrivacyError
from fedpeft.privacy.noise import NoiseSource, SeededNoise, SystemNoise
from fedpeft.runtime.randomness import stream


def noise_source(run: RunConfig, *purpose: str | int) -> NoiseSource:
    """The operating system's source; under `privacy.seeded` a stream of the run's seed for this purpose.

    Args:
        purpose: what the words are for, such as ``("release", round)``; two purposes never share a stream.
    """
    if run.privacy is not None and run.privacy.seeded:
        return SeededNoise(stream(run.run.seed, "privacy", *purpose))
    return SystemNoise()


def refuse_seeded(run: RunConfig) -> None:
    """Let no run pass whose noise its seed tells; what every deployed server and client calls first.

    Raises:
        PrivacyError: `privacy.seeded` is on.
    """
    if run.privacy is not None and run.privacy.seeded:
        raise PrivacyError(
            "privacy.seeded is on, so everybody who holds the run file can subtract the noise; this run is"
            " not a simulation: remove privacy.seeded"
        )
