"""Sending an update through stages as a round does: client hooks, bytes, server hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.stages import STAGES, Stage, StageContext, derive_payload, on_client, on_server, stage_list
from fedpeft.updates.update import Update, layout_of
from fedpeft.wire.codec import Envelope, decode, encode

SHAPES: Mapping[str, tuple[int, ...]] = {
    "layer.0.lora_A": (4, 96),
    "layer.0.lora_B": (80, 4),
    "layer.1.bias": (33,),
    "layer.1.scale": (1,),
    "layer.2.none": (0, 5),
    "layer.3.scalar": (),
}
DIGEST = "ab" * 32


def context(round_: int = 3, client: str = "ward-7", **more: Any) -> StageContext:
    return StageContext(seed=11, round=round_, client=client, **more)


def drawn(seed: int = 0, scale: float = 1e-3) -> Update:
    """Normal entries of different size per tensor."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: (scale * (i + 1) * rng.standard_normal(shape)).astype(np.float32)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return Update(arrays, weight=17, metrics={"loss": 0.5})


def zeros() -> Update:
    return Update({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, weight=17)


def built(kind: str, options: Mapping[str, Any]) -> Stage:
    stage: Stage = STAGES[kind](**options)
    return stage


def sent(stages: Sequence[Stage], update: Update, at: StageContext) -> bytes:
    """What leaves the client."""
    out = on_client(stages, update, at)
    envelope = Envelope(
        out.arrays, DIGEST, at.round, DIGEST, "adapter-delta", at.client, out.weight, out.metrics, out.encoded
    )
    return encode(Envelope(**{**vars(envelope), "stages": stage_list(stages), "base_digest": DIGEST}))


def received(stages: Sequence[Stage], payload: bytes, update: Update, at: StageContext) -> Update:
    """What the server makes of it; it has no memory of the client's."""
    layout, expect = layout_of(update.arrays), derive_payload(stages)
    envelope = decode(payload, who=at.client, layout=layout, expect=expect)
    came = Update(envelope.arrays, envelope.weight, envelope.metrics, envelope.encoded)
    return on_server(stages, came, StageContext(at.seed, at.round, at.client))


def passed(stages: Sequence[Stage], update: Update, at: StageContext) -> Update:
    return received(stages, sent(stages, update, at), update, at)


def wide(update: Update) -> dict[str, NDArray[np.float64]]:
    return {name: array.astype(np.float64) for name, array in update.arrays.items()}
