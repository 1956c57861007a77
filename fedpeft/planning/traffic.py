"""Bytes of a round, measured: the run's own stages and wire format on the run's own arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft.aggregation.lora_rules import Shares
from fedpeft.config.run_file import run_digest
from fedpeft.config.sampling import cohort_size
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FederationError
from fedpeft.models.trainable import trainable_parameters
from fedpeft.planning.loading import Loaded
from fedpeft.rounds.downlink.state_steps import CompressedSteps
from fedpeft.runtime.randomness import stream
from fedpeft.spaces import Space
from fedpeft.stages import Stage, StageContext, build_downlink, on_client, stage_list
from fedpeft.training.steps import examples_per_round, local_steps
from fedpeft.updates.update import Arrays, Update, arrays_digest, layout_of
from fedpeft.wire.codec import Envelope, encode
from fedpeft.wire.state_message import StateMessage, encode_state

_MOST_EXAMPLES = 100  # updates whose mean is a round's step: more visit hardly any further direction


@dataclass(frozen=True)
class Sizes:
    """Serialised bytes per client and round.

    Attributes:
        down: what a client gets half-way through the run: the state, or where that is less the step of one
            round to it.
        up: an update after the run's stages. Both are the space's own examples, drawn at random, as entropy
            coders spend nothing on zeros.
        up_zero: the same for an all-zero update; equal to `up` unless a stage's output depends on the values.
    """

    down: int
    up: int
    up_zero: int


def measure_sizes(
    run: RunConfig, loaded: Loaded, space: Space, stages: tuple[Stage, ...], *, client: str | None = None
) -> Sizes:
    """Encode a state, an update of random entries and one of zeros, as the first round has them.

    Args:
        client: whose part of them; None: one with the median number of rows, in no group if there is one.

    Raises:
        FedPEFTError: what a stage has against such an update.
    """
    state = space.initial_state(trainable_parameters(loaded.model))
    layout = space.update_layout(layout_of(state))
    digest = arrays_digest(state)
    name, rows = _middle_client(run, loaded, client)
    shares = Shares(run)
    visits = local_steps(run.training, rows) * run.training.queries
    rng = stream(run.run.seed, "plan")
    midway, drawn = space.example(state, visits, rng)
    down = _whole(run, space, shares.view(name, midway), digest)
    cohort = min(_MOST_EXAMPLES, cohort_size(run.federation.sampling, len(loaded.data.clients)))
    updates = [drawn, *(space.example(state, visits, rng)[1] for _ in range(cohort - 1))]
    change = space.example_step(midway, updates, rng)
    if change is not None:
        down = min(down, _step(run, space, change, digest))
    stage = build_downlink(run)
    if stage is not None:
        down = min(down, _measure_compressed_step(run, space, stage, midway, drawn))
    if not shares.all_alike:
        layout = shares.layout(name, layout, 1)
        drawn = {key: drawn[key][tuple(map(slice, shape))].copy() for key, (shape, _) in layout.items()}
    zeros = {key: np.zeros(shape, dtype=dtype) for key, (shape, dtype) in layout.items()}

    def up(arrays: Arrays) -> int:
        update = Update(arrays, rows, _report(run, rows))
        context = StageContext(run.run.seed, 1, name)
        update = on_client(stages, update, context)
        return len(
            encode(
                Envelope(
                    arrays=update.arrays,
                    run_digest=run_digest(run),
                    round=1,
                    state_digest=digest,
                    space=space.kind,
                    client=name,
                    weight=update.weight,
                    metrics=update.metrics,
                    encoded=update.encoded,
                    base_digest=digest,  # any digest: all have one length
                    stages=stage_list(stages),
                )
            )
        )

    return Sizes(down, up(drawn), up(zeros))


def _whole(run: RunConfig, space: Space, state: Arrays, digest: str) -> int:
    """Bytes of a state; any digest will do, as all have one length."""
    envelope = Envelope(state, run_digest(run), 1, digest, space.kind, base_digest=digest)
    return len(encode(envelope))


def _step(run: RunConfig, space: Space, change: Arrays, digest: str) -> int:
    """Bytes of one round's step, as a client gets it that took part in the round before."""
    step = encode(Envelope(change, run_digest(run), 1, digest, space.kind))
    return len(encode_state(StateMessage(digest, steps=(step,), keep=True)))


def _measure_compressed_step(
    run: RunConfig, space: Space, stage: Stage, state: Arrays, change: Arrays
) -> int:
    """As `_step`, through the run's downlink stage."""
    steps = CompressedSteps(run_digest(run), run.run.seed, space, stage)
    step = steps.make(1, state, {name: array.astype(np.float64) for name, array in change.items()}, {})
    message = StateMessage(arrays_digest(step.state), steps=(step.payload,), keep=True)
    return len(encode_state(message))


def _middle_client(run: RunConfig, loaded: Loaded, name: str | None) -> tuple[str, int]:
    """The named client, or that with the median number of rows: names and counts take part in the size."""
    known = [client for client in loaded.data.clients if name is None or client.name == name]
    alike = [client for client in known if run.group_of(client.name) is None]
    clients = sorted(alike or known, key=lambda client: (len(client.train), client.name))
    if not clients:
        raise FederationError(f"there is no client {name!r} in the run")
    middle = clients[len(clients) // 2]
    return middle.name, len(middle.train)


def _report(run: RunConfig, rows: int) -> dict[str, float]:
    """The numbers that accompany an update."""
    return {
        "loss": 0.0,
        "steps": local_steps(run.training, rows),
        "examples": examples_per_round(run.training, rows),
    }
