"""Bytes of a round, measured: the run's own stages and wire format on the run's own arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft.config import RunConfig
from fedpeft.models.trainable import trainable_parameters
from fedpeft.planning.loading import Loaded
from fedpeft.randomness import stream
from fedpeft.runfile import run_digest
from fedpeft.spaces import Space
from fedpeft.stages import Stage, StageContext, on_client, stage_list
from fedpeft.training.steps import examples_per_round, local_steps
from fedpeft.update import Arrays, Update, arrays_digest, layout_of
from fedpeft.wire.codec import Envelope, encode


@dataclass(frozen=True)
class Sizes:
    """Serialised bytes per client and round.

    Attributes:
        down: the state that a client gets, half-way through the run.
        up: an update after the run's stages. Both are the space's own examples, drawn at random, as entropy
            coders spend nothing on zeros.
        up_zero: the same for an all-zero update; equal to `up` unless a stage's output depends on the values.
    """

    down: int
    up: int
    up_zero: int


def measure_sizes(run: RunConfig, loaded: Loaded, space: Space, stages: tuple[Stage, ...]) -> Sizes:
    """Encode a state, an update of random entries and one of zeros.

    Raises:
        FedPEFTError: what a stage has against such an update.
    """
    state = space.initial_state(trainable_parameters(loaded.model))
    layout = space.update_layout(layout_of(state))
    digest = arrays_digest(state)
    name, rows = _middle_client(loaded)
    visits = local_steps(run.training, rows) * run.training.queries
    midway, drawn = space.example(state, visits, stream(run.run.seed, "plan"))
    down = encode(
        Envelope(
            arrays=midway,
            run_digest=run_digest(run),
            round=1,
            state_digest=digest,
            space=space.kind,
            base_digest=digest,  # any digest: all have one length
        )
    )
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

    return Sizes(len(down), up(drawn), up(zeros))


def _middle_client(loaded: Loaded) -> tuple[str, int]:
    """The client with the median number of rows: names and counts take part in the size."""
    clients = sorted(loaded.data.clients, key=lambda client: (len(client.train), client.name))
    middle = clients[len(clients) // 2]
    return middle.name, len(middle.train)


def _report(run: RunConfig, rows: int) -> dict[str, float]:
    """The numbers that accompany an update."""
    return {
        "loss": 0.0,
        "steps": local_steps(run.training, rows),
        "examples": examples_per_round(run.training, rows),
    }
