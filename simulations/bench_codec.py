"""How fast and how small is the ternary codec?

    python simulations/bench_codec.py --quick     (about 15 s, one core; without --quick two minutes)

Expected: encode and decode at 150 MB of fp32 delta per second or more at every density, within 1% of the
entropy bound, smaller than zlib level 6 on int8 and than zlib on packed trits, and no slower than either.

Timed on one thread, as the best of several runs of process time, over synthetic normal deltas of one large
tensor. MB are 10^6 bytes of fp32 delta; every key below is that of the worst density.

- `encode_mb_per_s`: fp32 delta to bytes. Top-k selection, standard deviation, signs, position coding,
checksum. - `decode_mb_per_s`: bytes to a new fp32 array. Checksum, position decoding, bounds checks, scaling.
- `bits_over_entropy_max`: (all bytes of the coded tensor, header and checksum included) over the entropy of
  independent ternary symbols, minus 1.
- `speed_vs_zlib`, `size_vs_zlib`: the same int8 ternary array by `encode` of an already ternary tensor, and
by
  `zlib.compress(.., 6)`. Speed is zlib's time over ours (1 and more: we are no slower); size is our bytes
  over zlib's (below 1: we are smaller). `decode_speed_vs_zlib` is the same for the way back to the int8
  array.
- `speed_vs_packed_zlib`, `size_vs_packed_zlib`, `decode_speed_vs_packed_zlib`: against zlib on packed trits,
  four or five in a byte, at level 1 or 6, packing included: whichever of the four is fastest, and whichever
  is smallest, at each density.
- `speed_vs_constriction`, `size_vs_constriction`: against the compiled entropy coder of the package
  `constriction` on the same entries (extra `bench`; None where it is not installed), the smaller of both
  directions.
- `speed_vs_python_golomb`: time of a plain Golomb-Rice coder in pure Python (below, on a list of integers)
over
  ours on the same entries with the coder `golomb`, so both do the same work; the smaller of both directions.
- `coders`: each position coder at each density, alone.

Compilation happens before timing. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedpeft.codec import (
    CODERS,
    DEFAULT_CODER,
    StdScale,
    TernaryTensor,
    decode,
    encode,
    ternarise,
    ternary_entropy_bits,
)
from fedpeft.codec.golomb import rice_parameter
from fedpeft.errors import MissingExtraError

DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
SEED = 0
PYTHON_ENTRIES = 1_000_000

Result = TypeVar("Result")


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description="Speed and size of the ternary codec.")
    parser.add_argument(
        "--quick", action="store_true", help="4 million entries and 3 repetitions: at most 50 s"
    )
    quick = parser.parse_args().quick
    entries, repeats = (4_000_000, 3) if quick else (32_000_000, 5)
    delta = np.random.default_rng(SEED).standard_normal(entries, dtype=np.float32) * np.float32(1e-3)
    rows = [measure(delta, density, repeats) for density in DENSITIES]
    print_table(rows)
    summary = {
        "encode_mb_per_s": round(min(row["encode_mb_per_s"] for row in rows), 1),
        "decode_mb_per_s": round(min(row["decode_mb_per_s"] for row in rows), 1),
        "bits_over_entropy_max": round(max(row["bits_over_entropy"] for row in rows), 6),
        "speed_vs_zlib": round(min(row["speed_vs_zlib"] for row in rows), 2),
        "decode_speed_vs_zlib": round(min(row["decode_speed_vs_zlib"] for row in rows), 2),
        "size_vs_zlib": round(max(row["size_vs_zlib"] for row in rows), 4),
        "speed_vs_packed_zlib": round(min(row["speed_vs_packed_zlib"] for row in rows), 2),
        "decode_speed_vs_packed_zlib": round(min(row["decode_speed_vs_packed_zlib"] for row in rows), 2),
        "size_vs_packed_zlib": round(max(row["size_vs_packed_zlib"] for row in rows), 4),
        **against_constriction(delta[: min(entries, 4_000_000)], repeats),
        "speed_vs_python_golomb": round(against_python(delta[:PYTHON_ENTRIES], repeats), 1),
        "coders": compare_coders(delta[: min(entries, 4_000_000)], repeats),
        "default_coder": DEFAULT_CODER,
        "entries": entries,
        "densities": DENSITIES,
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "zlib": zlib.ZLIB_RUNTIME_VERSION,
        },
    }
    print(json.dumps(summary))


def measure(delta: npt.NDArray[np.float32], density: float, repeats: int) -> dict[str, float]:
    """All numbers of one density but the pure-Python comparison."""
    megabytes = delta.nbytes / 1e6
    encode_s, data = time_fastest(lambda: encode(ternarise(delta, density, StdScale())), repeats)
    decode_s, dense = time_fastest(lambda: decode(data, delta.shape).dense(), repeats)
    ternary = ternarise(delta, density, StdScale())
    if not np.array_equal(dense, ternary.dense()):
        raise SystemExit(f"density {density}: decoding does not give back what was encoded")
    raw = ternary.trits.tobytes()
    zlib_encode_s, deflated = time_fastest(lambda: zlib.compress(raw, 6), 1)
    zlib_decode_s, _ = time_fastest(lambda: zlib.decompress(deflated), repeats)
    own_encode_s, _ = time_fastest(lambda: encode(ternary), repeats)
    own_decode_s, _ = time_fastest(lambda: decode(data, delta.shape), repeats)
    packed = [zlib_on_packed(ternary.trits, pack, level, repeats) for pack in PACKINGS for level in (1, 6)]
    bound = ternary_entropy_bits(int(np.count_nonzero(ternary.trits)), delta.size)
    bits = 8 * len(data) / delta.size
    return {
        "density": density,
        "encode_mb_per_s": megabytes / encode_s,
        "decode_mb_per_s": megabytes / decode_s,
        "bits_per_entry": bits,
        "bits_over_entropy": bits / bound - 1,
        "speed_vs_zlib": zlib_encode_s / own_encode_s,
        "decode_speed_vs_zlib": zlib_decode_s / own_decode_s,
        "size_vs_zlib": len(data) / len(deflated),
        "speed_vs_packed_zlib": min(one.encode_s for one in packed) / own_encode_s,
        "decode_speed_vs_packed_zlib": min(one.decode_s for one in packed) / own_decode_s,
        "size_vs_packed_zlib": len(data) / min(one.size for one in packed),
    }


@dataclass(frozen=True)
class Packed:
    """What packing and zlib made of one ternary tensor: seconds there and back, and bytes."""

    encode_s: float
    decode_s: float
    size: int


FACTORS: Mapping[int, npt.NDArray[np.uint8]] = {  # trits in a byte, and what each is worth there
    4: np.array([1, 4, 16, 64], dtype=np.uint8),
    5: np.array([1, 3, 9, 27, 81], dtype=np.uint8),
}
PACKINGS = tuple(FACTORS)


def zlib_on_packed(trits: npt.NDArray[np.int8], each: int, level: int, repeats: int) -> Packed:
    """Pack `each` trits into a byte, deflate, and the way back to the int8 array."""
    factors = FACTORS[each]
    base = int(factors[1])
    table = np.stack([np.arange(256) // int(factor) % base for factor in factors], axis=1).astype(np.int8) - 1
    padded = -(-trits.size // each) * each

    def there() -> bytes:
        shifted = np.ones(padded, dtype=np.uint8)
        np.add(trits, 1, out=shifted[: trits.size], casting="unsafe")
        columns = shifted.reshape(-1, each)
        total = columns[:, 0].copy()
        for place in range(1, each):
            total += columns[:, place] * factors[place]
        return zlib.compress(total.tobytes(), level)

    def back(data: bytes) -> npt.NDArray[np.int8]:
        packed = np.frombuffer(zlib.decompress(data), dtype=np.uint8)
        return table[packed].reshape(-1)[: trits.size].reshape(trits.shape)

    encode_s, data = time_fastest(there, 1)
    decode_s, copy = time_fastest(lambda: back(data), repeats)
    if not np.array_equal(copy, trits):
        raise SystemExit(f"{each} trits in a byte do not come back")
    return Packed(encode_s, decode_s, len(data))


def against_constriction(delta: npt.NDArray[np.float32], repeats: int) -> dict[str, float | str | None]:
    """The package's coder over ours: time (the smaller ratio of both ways) and our size over its, worst."""
    speeds, sizes = [], []
    for density in DENSITIES:
        ternary = ternarise(delta, density, StdScale())
        times, lengths = {}, {}
        for coder in (DEFAULT_CODER, "constriction"):
            try:
                encode_s, data = time_fastest(lambda: encode(ternary, coder), repeats)  # noqa: B023 - run at once
            except MissingExtraError:
                return {"speed_vs_constriction": None, "size_vs_constriction": None, "constriction": None}
            decode_s, _ = time_fastest(lambda: decode(data, ternary.shape), repeats)  # noqa: B023 - run at once
            times[coder], lengths[coder] = (encode_s, decode_s), len(data)
        ours, theirs = times[DEFAULT_CODER], times["constriction"]
        speeds.append(min(their / our for our, their in zip(ours, theirs, strict=True)))
        sizes.append(lengths[DEFAULT_CODER] / lengths["constriction"])
    return {
        "speed_vs_constriction": round(min(speeds), 2),
        "size_vs_constriction": round(max(sizes), 4),
        "constriction": version("constriction"),
    }


def compare_coders(delta: npt.NDArray[np.float32], repeats: int) -> list[dict[str, Any]]:
    """Positions alone: bits over the entropy (one bit per sign included) and nanoseconds per entry."""
    rows = []
    for density in DENSITIES:
        indices = np.flatnonzero(ternarise(delta, density, StdScale()).trits).astype(np.int32)
        bound = ternary_entropy_bits(indices.size, delta.size)
        for name, coder in CODERS.items():
            row = {"coder": name, "density": density}
            try:
                encode_s, data = time_fastest(lambda: coder.encode(indices, delta.size), repeats)  # noqa: B023 - run at once
                decode_s, _ = time_fastest(
                    lambda: coder.decode(memoryview(data), indices.size, delta.size),  # noqa: B023 - run at once
                    repeats,
                )
            except MissingExtraError:
                rows.append(row | {"skipped": "not installed"})
                continue
            bits = (8 * len(data) + indices.size) / delta.size
            rows.append(
                row
                | {
                    "bits_over_entropy": round(bits / bound - 1, 6),
                    "encode_ns": round(1e9 * encode_s / delta.size, 3),
                    "decode_ns": round(1e9 * decode_s / delta.size, 3),
                }
            )
    return rows


def against_python(delta: npt.NDArray[np.float32], repeats: int) -> float:
    """Pure Python over ours, the smaller ratio of encoding and decoding, the smallest over the densities."""
    ratios = []
    for density in DENSITIES:
        ternary = ternarise(delta, density, StdScale())
        trits = ternary.trits.tolist()
        count = sum(map(abs, trits))
        parameter = rice_parameter(count, len(trits))
        slow_encode_s, bits = time_fastest(lambda: python_golomb_encode(trits, parameter), 1)  # noqa: B023 - run at once
        slow_decode_s, back = time_fastest(
            lambda: python_golomb_decode(bits, parameter, count, len(trits)),  # noqa: B023 - run at once
            1,
        )
        if back != trits:
            raise SystemExit("the pure-Python coder does not give back what it encoded")
        fast_encode_s, fast_decode_s = time_ours(ternary, 4 * repeats)
        ratios.append(min(slow_encode_s / fast_encode_s, slow_decode_s / fast_decode_s))
    return min(ratios)


def time_ours(ternary: TernaryTensor, repeats: int) -> tuple[float, float]:
    """Seconds to encode and to decode by the compiled Golomb coder."""
    encode_s, data = time_fastest(lambda: encode(ternary, "golomb"), repeats)
    decode_s, _ = time_fastest(lambda: decode(data, ternary.shape), repeats)
    return encode_s, decode_s


def python_golomb_encode(trits: list[int], parameter: int) -> bytes:
    """Each gap in unary and `parameter` low bits, then its sign; lowest bits first."""
    out = bytearray()
    buffer = held = gap = 0
    low_mask = (1 << parameter) - 1
    for trit in trits:
        if trit == 0:
            gap += 1
            continue
        quotient = gap >> parameter
        code = ((1 << quotient) - 1) | ((gap & low_mask) << (quotient + 1))
        width = quotient + 1 + parameter
        buffer |= (code | ((trit < 0) << width)) << held
        held += width + 1
        while held >= 8:
            out.append(buffer & 255)
            buffer >>= 8
            held -= 8
        gap = 0
    if held:
        out.append(buffer)
    return bytes(out)


def python_golomb_decode(data: bytes, parameter: int, count: int, size: int) -> list[int]:
    """Inverse of `python_golomb_encode` for `count` non-zeros."""
    trits = [0] * size
    buffer = held = read = 0
    position = -1
    low_mask = (1 << parameter) - 1
    for _ in range(count):
        quotient = 0
        while True:
            if held == 0:
                buffer, held, read = data[read], 8, read + 1
            bit = buffer & 1
            buffer >>= 1
            held -= 1
            if not bit:
                break
            quotient += 1
        while held < parameter + 1:
            buffer |= data[read] << held
            held, read = held + 8, read + 1
        position += 1 + (quotient << parameter) + (buffer & low_mask)
        buffer >>= parameter
        trits[position] = -1 if buffer & 1 else 1
        buffer >>= 1
        held -= parameter + 1
    return trits


def time_fastest(action: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Smallest process time of `repeats` runs after one untimed run (none before a single repetition)."""
    result = action() if repeats > 1 else None
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = action()
        best = min(best, time.process_time() - start)
    return max(best, 1e-9), result  # type: ignore[return-value]  # repeats >= 1, so an action has run


def print_table(rows: list[dict[str, float]]) -> None:
    """One line per density."""
    names = list(rows[0])
    print("  ".join(f"{name:>20}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:20.4f}" for name in names))


if __name__ == "__main__":
    main()
