"""Millions of damaged and hostile update messages: none may crash the reader or be folded in unnoticed.

    python -m tests.wire.fuzz_update --count 1000000 --seed 0

Prints one JSON object: how many messages there were, how many were refused, how many were read. A message
whose checksum was left alone must be refused unless it is the original; one that was sealed again must be
refused, or read as arrays of the run's own layout, finite after decompression, within the memory bound. An
error of any other class ends the script with its traceback, the seed and the number of the message.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np

from fedpeft.errors import MissingExtraError, UpdateError
from fedpeft.updates.packed import Packing
from fedpeft.updates.update import Layout
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.checksum import SIZE, seal
from fedpeft.wire.codec import decode, encode
from fedpeft.wire.payloads import Payload
from tests.wire.messages import ENVELOPES, LAYOUT, PAYLOADS

MEMORY_BOUND = 4 * 2**20  # bytes for a layout of 138 entries: no declared size is believed
MEASURED_EVERY = 97  # tracemalloc costs ten times the decoding
_VALUES = (0, 1, 2, 3, 7, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few random edits: bits, bytes, cuts, insertions, repeats."""
    edited = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(edited) + 1)
        match rng.randrange(6):
            case 0 if edited:
                edited[place % len(edited)] ^= 1 << rng.randrange(8)
            case 1 if edited:
                edited[place % len(edited)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del edited[place : place + rng.choice((1, 2, 8, len(edited)))]
            case 3:
                edited[place:place] = rng.randbytes(rng.choice((1, 2, 8)))
            case 4:
                edited[place:place] = edited[place : place + rng.choice((1, 4, 64))]
            case _:
                edited[place : place + 8] = struct.pack("<Q", rng.choice(_VALUES))
    return bytes(edited)


def resealed(data: bytes, rng: random.Random) -> bytes:
    """Damaged before the checksum, which is then made to fit."""
    return seal([damaged(data[:-SIZE], rng)])


def forged(data: bytes, rng: random.Random) -> bytes:
    """A well-formed message with hostile fields; compressed tensors get a fitting checksum of their own."""
    message = pb.Update.FromString(data)
    kind = message.WhichOneof("payload")
    if kind == "dense":
        tensor = rng.choice(message.dense.index.tensors)
        match rng.randrange(7):
            case 0:
                tensor.shape[:] = [rng.choice(_VALUES) for _ in range(rng.randrange(10))]
            case 1:
                message.dense.values = damaged(message.dense.values, rng)
            case 5:
                message.dense.padding = rng.randbytes(rng.randrange(20))
            case 6:  # a payload twice, or two kinds of payload: the last of a oneof would win
                second = ORIGINALS[rng.choice(PAYLOADS)][:-SIZE]
                return seal([data[:-SIZE], second] if rng.random() < 0.5 else [second, data[:-SIZE]])
            case 2:
                tensor.dtype = rng.choice((0, 1, 2, 3, 77))  # type: ignore[assignment]  # hostile
            case 3:
                tensor.name = rng.choice(("", "a.weight", "x" * 5000))
            case _:
                message.dense.index.tensors.add().CopyFrom(tensor)
    else:
        coded = getattr(message, str(kind))
        index = rng.randrange(len(coded.tensors))
        match rng.randrange(8):
            case 0:
                del coded.tensors[index]
            case 1:
                coded.tensors[index] = coded.tensors[rng.randrange(len(coded.tensors))]
            case 2:
                other = pb.Update.FromString(ORIGINALS[rng.choice(PAYLOADS[1:])])
                coded.tensors[index] = getattr(other, other.WhichOneof("payload") or "").tensors[index]
            case _:
                body = damaged(coded.tensors[index][:-4], rng)
                coded.tensors[index] = body + struct.pack("<I", zlib.crc32(body))
    if rng.random() < 0.1:
        header = message.header
        header.round = rng.choice((0, 2**32 - 1))
        header.weight = rng.choice(_VALUES)
        header.metrics["x" * rng.choice((1, 70))] = rng.choice((float("nan"), float("inf"), 1e308))
        header.client = "c" * rng.choice((0, 2000))
    message.ClearField("checksum")
    return seal([message.SerializeToString()])


PACKING = Packing(LAYOUT)
ORIGINALS: dict[Payload, bytes] = {payload: encode(ENVELOPES[payload]) for payload in PAYLOADS}
ATTACKS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "damaged": damaged,
    "resealed": resealed,
    "forged": forged,
}


def attempt(data: bytes, expect: Payload, layout: Layout) -> bool:
    """Whether the message was read; what was read is checked.

    Raises:
        AssertionError: it was read as something that no run of this layout can send.
    """
    try:
        envelope = decode(data, who="ward-7", layout=layout, expect=expect)
        dense = {name: tensor.dense() for name, tensor in envelope.encoded.items()}
    except (UpdateError, MissingExtraError):
        return False
    arrays = {**envelope.arrays, **dense}
    assert {name: (array.shape, array.dtype.str) for name, array in arrays.items()} == dict(LAYOUT)
    if expect != "dense":  # the fold refuses plain NaN; a compressed form can't hold one
        assert all(np.isfinite(array).all() for array in dense.values())
    return True


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Try `count` messages; how many of which attack were refused and read."""
    rng = random.Random(seed)
    tally: Counter[str] = Counter(messages=count)
    for number in range(count):
        expect = rng.choice(PAYLOADS)
        attack = rng.choice(tuple(ATTACKS))
        data = ATTACKS[attack](ORIGINALS[expect], rng)
        try:
            layout = rng.choice((LAYOUT, PACKING))
            check = _measured if number % MEASURED_EVERY == 0 else attempt
            read = check(data, expect, layout)
            assert not (read and attack == "damaged") or data == ORIGINALS[expect], "a change went unnoticed"
        except BaseException:
            print(f"message {number} of seed {seed}: {attack} {expect} {data.hex()}")
            raise
        tally[f"{attack}_{'read' if read else 'refused'}"] += 1
    return dict(tally)


def _measured(data: bytes, expect: Payload, layout: Layout) -> bool:
    tracemalloc.start()
    try:
        read = attempt(data, expect, layout)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BOUND, f"{peak} bytes were allocated"
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the reader of update messages.")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    tally = fuzz(arguments.count, arguments.seed)
    print(json.dumps({**tally, "seed": arguments.seed, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
