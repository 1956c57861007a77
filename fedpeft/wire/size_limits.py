"""What a message may hold at most; the numbers that `update.proto` states."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np

from fedpeft.errors import UpdateError
from fedpeft.updates.packed import Packing
from fedpeft.updates.update import Layout
from fedpeft.v1 import update_pb2 as pb

DIGEST_BYTES = 32
MAX_TENSORS = 65536
MAX_METRICS = 64
MAX_STAGES = 32
_MAX_HEADER_BYTES = 256 * 1024
_TENSOR_OVERHEAD = 512  # bytes beside name and values: shape, form, scales of a small tensor, checksum


def max_payload_bytes(layout: Layout) -> int:
    """No update of this layout needs more bytes, in any form: twice the plain values, and some room."""
    values = sum(2 * math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
    return _MAX_HEADER_BYTES + values + sum(len(name.encode()) + _TENSOR_OVERHEAD for name in layout)


def check_size(payload: bytes, layout: Layout, who: str) -> None:
    """Refuse a message longer than any of this layout.

    Raises:
        UpdateError: naming `who` sent it.
    """
    most = _most(layout) if isinstance(layout, Packing) else max_payload_bytes(layout)
    if len(payload) > most:
        raise UpdateError(f"{who}: {len(payload)} bytes came, an update of this run has at most {most}")


_most = functools.lru_cache(maxsize=8)(max_payload_bytes)


def check_header(header: pb.Header, who: str) -> None:
    """Refuse a header with longer fields than the schema allows.

    Raises:
        UpdateError: naming the field.
    """
    digests = (
        ("run_digest", header.run_digest),
        ("state_digest", header.state_digest),
        ("base_digest", header.base_digest),
    )
    for field, digest in digests:
        if len(digest) not in (0, DIGEST_BYTES):
            raise UpdateError(f"{who}: {field} has {len(digest)} bytes, {DIGEST_BYTES} are needed")
    stages = header.stages
    sizes = (
        ("client", len(header.client.encode()), 1024),
        ("space", len(header.space.encode()), 64),
        ("metrics", len(header.metrics), MAX_METRICS),
        ("a metric's name", _longest(header.metrics), 64),
        ("stages", len(stages), MAX_STAGES),
        ("a stage's kind", _longest(stage.kind for stage in stages), 64),
        ("a stage's parameters", _longest(stage.parameters for stage in stages), 4096),
    )
    for what, came, most in sizes:
        if came > most:
            raise UpdateError(f"{who}: the header's {what} has size {came}, at most {most} is accepted")


def _longest(texts: Iterable[str]) -> int:
    return max([len(text.encode()) for text in texts], default=0)
