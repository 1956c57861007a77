"""Messages of every payload that a run of one small layout may send."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeft import codec
from fedpeft.updates.update import Arrays, Layout, layout_of
from fedpeft.wire.codec import Envelope
from fedpeft.wire.payloads import Payload

DIGEST, OTHER_DIGEST = "0f" * 32, "a1" * 32


def values(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (6, 20), "b.bias": (17,), "c.empty": (0, 3), "d.scalar": ()}
    return {name: np.asarray(rng.standard_normal(shape), dtype=np.float32) for name, shape in shapes.items()}


LAYOUT: Layout = layout_of(values())


def encoded(payload: Payload, arrays: Arrays) -> dict[str, codec.Encoded]:
    """Every non-empty array in a form of that payload."""
    source = codec.PublicSource(5, 2, 9)
    rng = np.random.default_rng(1)
    forms = {
        "sparse": lambda x: codec.top_k(x, 0.3) if x.ndim else codec.random_k(x, 1.0, source),
        "ternary": lambda x: codec.ternarise(x, 0.2, codec.StdScale(1.5)),
        "quantised": lambda x: codec.quantise(x, 4, rng, codec.default_channel_axis(x.shape)),
        "sign": codec.sign_with_scale,
    }
    return {
        name: forms[payload](array) if array.size else codec.DenseTensor(array)
        for name, array in arrays.items()
    }


def envelope(payload: Payload, arrays: Arrays | None = None) -> Envelope:
    arrays = values() if arrays is None else arrays
    dense = payload == "dense"
    return Envelope(
        arrays=arrays if dense else {},
        run_digest=DIGEST,
        round=3,
        state_digest=OTHER_DIGEST,
        space="adapter-delta",
        client="ward-7",
        weight=41,
        metrics={"loss": 0.25, "steps": 7.0},
        encoded={} if dense else encoded(payload, arrays),
        base_digest=DIGEST,
        stages=(("weigh", "{}"), ("ternary", '{"density":0.2}')),
    )


PAYLOADS: tuple[Payload, ...] = ("dense", "sparse", "ternary", "quantised", "sign")
ENVELOPES: Mapping[Payload, Envelope] = {payload: envelope(payload) for payload in PAYLOADS}
