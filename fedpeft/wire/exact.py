"""Payloads of exact integers: what a space of seeded directions sends, entropy-coded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.seedspace.scalar_codec import decode_amounts, encode_amounts
from fedpeft.updates.packed import Packing
from fedpeft.updates.update import Arrays, Layout
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.size_limits import MAX_TENSORS

AMOUNTS = "amounts"  # the one array that travels as seed-scalars; others go by their names
MOST_ENTRIES = 2**26  # of all arrays of a message whose layout the receiver doesn't know
_LARGEST = 2**62 - 1  # what the code can express; tighter ranges are the space's own
_RELATIONS: Mapping[pb.Relation, Callable[[NDArray[Any]], NDArray[Any]]] = {
    pb.RELATION_SIZE: np.abs,
    pb.RELATION_SUPPORT: lambda array: (array != 0).astype(np.int64),
}

Exact = Literal["seed_scalars", "projected"]


def exact_payload(layout: Layout) -> Exact | None:
    """The payload for arrays of this layout: exact if all are int64 vectors, else None."""
    if isinstance(layout, Packing) and layout.dtype != np.int64:
        return None
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
        block = message.projected.blocks.add(block=name, num_seeds=len(arrays[name]))
        block.amounts = encode_amounts(arrays[name])
        if name > AMOUNTS and AMOUNTS in arrays and len(arrays[AMOUNTS]) == len(arrays[name]):
            _write_related(block, arrays[name], arrays[AMOUNTS])


def _write_related(block: pb.ProjectedBlock, array: NDArray[Any], amounts: NDArray[Any]) -> None:
    """Write what the amounts leave open, where that is shorter.

    Sums of sizes and numbers of visits follow them: where a direction was visited once, it tells both.
    """
    for relation, told in _RELATIONS.items():
        rest = array - told(amounts)
        if codable({block.block: rest}) and len(coded := encode_amounts(rest)) < len(block.amounts):
            block.amounts, block.relation, block.of = coded, relation, AMOUNTS


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
    for name, length, coded, relation, of in _vectors(message, payload, who):
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
        if relation != pb.RELATION_NONE:
            arrays[name] = arrays[name] + _read_relation(arrays, name, length, relation, of, who)
            if not codable({name: arrays[name]}):
                raise UpdateError(f"{who}: array {name!r} reaches 2^62")
        arrays[name].flags.writeable = False
    if layout is not None and len(arrays) != len(layout):
        missing = sorted(set(layout) - set(arrays))
        raise UpdateError(f"{who}: array {missing[0]!r} is missing, {len(arrays)} of {len(layout)} came")
    return arrays


def _read_relation(
    arrays: Arrays, name: str, length: int, relation: pb.Relation, of: str, who: str
) -> NDArray[Any]:
    """What an earlier array tells of this one."""
    if of == name or of not in arrays or len(arrays[of]) != length or relation not in _RELATIONS:
        raise UpdateError(
            f"{who}: array {name!r} is told by {of!r} in the way {relation}; an earlier one of its length is"
            " needed, and a known way"
        )
    return _RELATIONS[relation](arrays[of])


def _vectors(message: pb.Update, payload: Exact, who: str) -> list[tuple[str, int, bytes, pb.Relation, str]]:
    if payload == "seed_scalars":
        scalars = message.seed_scalars
        return [(AMOUNTS, scalars.num_seeds, scalars.amounts, pb.RELATION_NONE, "")]
    blocks = message.projected.blocks
    if len(blocks) > MAX_TENSORS:
        raise UpdateError(f"{who}: {len(blocks)} blocks came, at most {MAX_TENSORS} are accepted")
    return [(block.block, block.num_seeds, block.amounts, block.relation, block.of) for block in blocks]
