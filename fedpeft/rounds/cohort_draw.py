"""Who is asked in a round, and what the virtual clock makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fedpeft.config.sampling import cohort_size, sample_cohort
from fedpeft.config.sections import ClientLevelPrivacy, RunConfig
from fedpeft.errors import PrivacyError
from fedpeft.ledger import Cohort
from fedpeft.ledger.records import ClientOutcome
from fedpeft.privacy.central import poisson_cohort, sample_rate_of
from fedpeft.privacy.noise import NoiseSource
from fedpeft.rounds.simulated_clock import VirtualClock
from fedpeft.runtime.randomness import stream
from fedpeft.training.steps import examples_per_round
from fedpeft.transport.roster import Roster


def draw_cohort(
    run: RunConfig,
    roster: Roster,
    round_: int,
    *,
    bytes_down: Callable[[str], int],
    bytes_up: int,
    coins: NoiseSource | None = None,
) -> Cohort:
    """Sample a round's cohort from the run's seed; with a virtual clock, decide who answers in time.

    On the clock, late clients don't train: nothing of what they would compute is used. Without it, who is
    late shows when answers come: of an over-selected cohort all work, and as many count as there are
    `places`. `bytes_down` says what each client is sent, by name; `bytes_up` is what an update is expected to
    weigh, since its true size is known only after training.

    Args:
        coins: secret ones, for client-level privacy: each client is asked by its own, and the run's seed has
            no part in it.
    """
    federation, seed, names = run.federation, run.run.seed, roster.in_round(round_)
    rng = stream(seed, "cohort", round_)
    if federation.clock is None:
        asked = (
            sample_cohort(federation.sampling, names, len(names), rng, federation.over_selection)
            if coins is None
            else _secretly(run, coins, names)
        )
        places = _places(run, len(names), asked)
        return Cohort(tuple(asked), dict.fromkeys(asked, 0.0), places=places)
    clock = VirtualClock(federation.clock, seed)
    present = [name for name in names if clock.available(name, round_)]
    if coins is None:
        asked = sample_cohort(federation.sampling, present, len(names), rng, federation.over_selection)
    else:
        asked = sorted(set(_secretly(run, coins, names)) & set(present))
    arrivals = {}
    for name in asked:
        examples = examples_per_round(run.of_client(name).training, roster.members[name].examples)
        fate = clock.fate(name, round_, examples=examples, bytes_down=bytes_down(name), bytes_up=bytes_up)
        arrivals[name] = fate.arrives_s
    return _close(run, len(names), tuple(asked), arrivals)


def _secretly(run: RunConfig, coins: NoiseSource, names: list[str]) -> list[str]:
    """A Poisson cohort at the rate that the accountant is told.

    Raises:
        PrivacyError: the run is not private at client level, or claims no sound rate.
    """
    if not isinstance(run.privacy, ClientLevelPrivacy):
        raise PrivacyError("a secret cohort was asked for and the run has no client-level [privacy]")
    return poisson_cohort(coins, names, sample_rate_of(run.federation, max_weight=run.privacy.max_weight))


def _close(run: RunConfig, total: int, asked: tuple[str, ...], arrivals: Mapping[str, float]) -> Cohort:
    """Apply the deadline and, under over-selection, keep the quickest."""
    federation = run.federation
    deadline = federation.deadline_s if federation.deadline_s is not None else math.inf
    order = sorted(asked, key=lambda name: (arrivals[name], name))
    intime = [name for name in order if arrivals[name] <= deadline and not math.isinf(arrivals[name])]
    places = _places(run, total, asked)
    kept = intime[:places]
    lost = [
        ClientOutcome(client=name, status="dropped", reason="vanished after it was asked")
        if math.isinf(arrivals[name])
        else ClientOutcome(
            client=name, status="late", reason="after the round had closed", virtual_s=arrivals[name]
        )
        for name in order
        if name not in kept
    ]
    last = max((arrivals[name] for name in kept), default=0.0)
    missing = len(kept) < (len(asked) if places is None else places)
    length = deadline if missing and not math.isinf(deadline) else last  # the server waits for who is missing
    return Cohort(asked, {name: arrivals[name] for name in sorted(kept)}, tuple(lost), length, places)


def _places(run: RunConfig, total: int, asked: Sequence[str]) -> int | None:
    """How many answers close a round whose cohort is over-selected; None: all."""
    federation = run.federation
    if federation.sampling.kind == "poisson" or not federation.over_selection:
        return None
    wanted = cohort_size(federation.sampling, total)
    return wanted if wanted < len(asked) else None
