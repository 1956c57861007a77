"""Payloads of exact integers: what a space of seeded directions sends, entropy-coded."""

from __future__ import annotations

from typing import Any, Literal

from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.seedspace.scalar_codec import decode_amounts, encode_amounts
from fedpeft.update import Arrays, Layout
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.bounds import MAX_TENSORS

AMOUNTS = "amounts"  # the one array that travels as seed-scalars; others go by their names
MOST_ENTRIES = 2**26  # of all arrays of a message whose layout the receiver doesn't know
_LARGEST = 2**62 - 1  # what the code can express; tighter ranges are the space's own

Exact = Literal["seed_scalars", "projected"]


def exact_payload(layout: Layout) -> Exact | None:
    """The payload for arrays of this layout: exact if all are int64 vectors, else None."""
    if not layout or any(len(shape) != 1 or dtype != "<i8" for shape, dtype in layout.values()):
        return None
    return "seed_scalars" if set(layout) == {AMOUNTS} else "projected"


def codable(arrays: Arrays) -> bool:
    """Whether the code can express every entry; what it cannot travels as plain values."""
    return all(
        not array.size or -_LARGEST <= array.min() <= array.max() <= _LARGEST for array in arrays.values()
    )


def write_exact(message: pb.Update, arrays: Arrays, payload: Exact) -> None:
    """Fill in the payload of integer vectors that are `codable`."""
    if payload == "seed_scalars":
        message.seed_scalars.num_seeds = len(arrays[AMOUNTS])
        message.seed_scalars.amounts = encode_amounts(arrays[AMOUNTS])
        return
    for name in sorted(arrays):
        coded = encode_amounts(arrays[name])
        message.projected.blocks.add(block=name, num_seeds=len(arrays[name]), amounts=coded)


def read_exact(
    message: pb.Update, payload: Exact, who: str, layout: Layout | None
) -> dict[str, NDArray[Any]]:
    """Check and take out integer vectors: read-only, one per name, all of `layout` if it is given.

    Lengths are compared with the layout, or with a bound for the whole message, before they are used.

    Raises:
        UpdateError: they contradict `layout` or themselves.
    """
    arrays: dict[str, NDArray[Any]] = {}
    room = MOST_ENTRIES
    for name, length, coded in _vectors(message, payload, who):
        if name in arrays:
            raise UpdateError(f"{who}: array {name!r} came twice")
        if layout is not None and layout.get(name, ((), ""))[0] != (length,):
            raise UpdateError(f"{who}: array {name!r} of {length} integers is not part of this run")
        room -= length
        if room < 0:
            raise UpdateError(f"{who}: more than {MOST_ENTRIES} integers came")
        try:
            arrays[name] = decode_amounts(coded, length, _LARGEST)
        except UpdateError as error:
            raise UpdateError(f"{who}: array {name!r}: {error}") from error
        arrays[name].flags.writeable = False
    if layout is not None and len(arrays) != len(layout):
        missing = sorted(set(layout) - set(arrays))
        raise UpdateError(f"{who}: array {missing[0]!r} is missing, {len(arrays)} of {len(layout)} came")
    return arrays


def _vectors(message: pb.Update, payload: Exact, who: str) -> list[tuple[str, int, bytes]]:
    if payload == "seed_scalars":
        return [(AMOUNTS, message.seed_scalars.num_seeds, message.seed_scalars.amounts)]
    blocks = message.projected.blocks
    if len(blocks) > MAX_TENSORS:
        raise UpdateError(f"{who}: {len(blocks)} blocks came, at most {MAX_TENSORS} are accepted")
    return [(block.block, block.num_seeds, block.amounts) for block in blocks]
