"""`.fpz`: one compressed adapter in one file.

Layout: magic (8 bytes), version and index length (two uint32), the index, the tensors' bytes in the order of
the index, and SHA-256 of everything before it. The index is UTF-8 JSON, `{"metadata": {...}, "tensors":
[[name, length], ...]}`, so a person can read it with `head`. The magic's line ends are there to show a
transfer in text mode. All integers are little-endian.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fedpeft.codec.coded import decode_up_to, encode
from fedpeft.codec.position_coders import DEFAULT_CODER
from fedpeft.codec.tensors import Encoded
from fedpeft.errors import StorageError, UpdateError
from fedpeft.runtime.files import write_atomically

MAGIC = b"\x89FPZ\r\n\x1a\n"
VERSION = 1
SUFFIX = ".fpz"
_HEAD = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_MAX_INDEX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Expert:
    """A compressed adapter: its tensors, and JSON metadata with at least `base_digest` (of its model)."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Encoded]

    @property
    def base_digest(self) -> str:
        """Digest of the base model that the deltas were trained on."""
        return str(self.metadata["base_digest"])


@dataclass(frozen=True)
class ReadBounds:
    """What a reader accepts: bytes of the file, and elements of all tensors together."""

    max_bytes: int = 2**31
    max_elements: int = 2**28


def write_expert(path: Path, expert: Expert, coder: str = DEFAULT_CODER) -> int:
    """Write `expert` so that `path` holds the old file or the whole new one; returns its size in bytes.

    Raises:
        UpdateError: no `base_digest`, metadata that is not JSON, or no tensors.
        StorageError: the disk is full or the folder cannot be written.
    """
    data = _to_bytes(expert, coder)
    write_atomically(path, data)
    return len(data)


def read_expert(path: Path, bounds: ReadBounds = ReadBounds()) -> Expert:
    """Read and verify a `.fpz` file.

    Raises:
        StorageError: it cannot be opened or read.
        UpdateError: it is larger than `bounds`, not such a file, of another version, truncated, or corrupt.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > bounds.max_bytes:
                raise UpdateError(f"{path} has {size} bytes: at most {bounds.max_bytes} are accepted")
            # One more than its size: a file that grows meanwhile fails its digest instead of filling memory.
            data = file.read(size + 1)
    except OSError as problem:
        raise StorageError(f"cannot read {path}: {problem.strerror or problem}") from problem
    try:
        return _from_bytes(memoryview(data), bounds.max_elements)
    except UpdateError as problem:
        raise UpdateError(f"{path}: {problem}") from problem


def _to_bytes(expert: Expert, coder: str) -> bytes:
    _check_metadata(expert.metadata)
    if not expert.tensors:
        raise UpdateError("an expert without tensors: there is nothing to write")
    bodies = {name: encode(tensor, coder) for name, tensor in expert.tensors.items()}
    listed = [[name, len(body)] for name, body in bodies.items()]
    try:
        index = json.dumps(
            {"metadata": dict(expert.metadata), "tensors": listed},
            ensure_ascii=False,
            allow_nan=False,
            sort_keys=True,
        ).encode()
    except (TypeError, ValueError) as problem:
        raise UpdateError(f"expert metadata must be plain JSON: {problem}") from problem
    if len(index) > _MAX_INDEX_BYTES:
        raise UpdateError(
            f"expert index of {len(index)} bytes: {_MAX_INDEX_BYTES} is the most, shorten the metadata"
        )
    content = _HEAD.pack(MAGIC, VERSION, len(index)) + index + b"".join(bodies.values())
    return content + hashlib.sha256(content).digest()


def _from_bytes(data: memoryview, max_elements: int) -> Expert:
    if len(data) < _HEAD.size + _DIGEST_BYTES:
        raise UpdateError(f"{len(data)} bytes are too few for an expert file: truncated")
    magic, version, index_length = _HEAD.unpack(data[: _HEAD.size])
    if magic != MAGIC:
        raise UpdateError(
            "not an expert file (its first bytes differ), or changed by a transfer in text mode"
        )
    if version != VERSION:
        raise UpdateError(f"expert file of version {version}: this release reads {VERSION}, upgrade it")
    content = data[:-_DIGEST_BYTES]
    if hashlib.sha256(content).digest() != data[-_DIGEST_BYTES:]:
        raise UpdateError("its digest does not match its bytes: truncated or corrupt, fetch it again")
    body_at = _HEAD.size + index_length
    if index_length > _MAX_INDEX_BYTES or body_at > len(content):
        raise UpdateError(f"an index of {index_length} bytes is declared in {len(content)}: corrupt")
    metadata, listed = _index(bytes(content[_HEAD.size : body_at]))
    return Expert(metadata, _tensors(content[body_at:], listed, max_elements))


def _index(raw: bytes) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        index = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as problem:
        raise UpdateError(f"its index is not JSON: {problem}") from problem
    if not isinstance(index, dict) or index.keys() != {"metadata", "tensors"}:
        raise UpdateError("its index needs exactly the keys metadata and tensors")
    metadata, listed = index["metadata"], index["tensors"]
    if not isinstance(metadata, dict) or not isinstance(listed, list) or not listed:
        raise UpdateError("its index needs an object of metadata and a list of at least one tensor")
    _check_metadata(metadata)
    lengths: dict[str, int] = {}
    for row in listed:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) is int):
            raise UpdateError("its index needs [name, length] for each tensor")
        if row[0] in lengths:
            raise UpdateError(f"its index names {row[0]!r} twice")
        lengths[row[0]] = row[1]
    return metadata, lengths


def _tensors(body: memoryview, lengths: Mapping[str, int], max_elements: int) -> dict[str, Encoded]:
    if any(length < 0 for length in lengths.values()) or sum(lengths.values()) != len(body):
        raise UpdateError(f"its tensors are declared with other lengths than the {len(body)} bytes that came")
    tensors: dict[str, Encoded] = {}
    at, left = 0, max_elements
    for name, length in lengths.items():
        tensor = decode_up_to(body[at : at + length], left)
        at += length
        left -= _elements(tensor)
        tensors[name] = tensor
    return tensors


def _elements(tensor: Encoded) -> int:
    count = 1
    for side in tensor.shape:
        count *= side
    return count


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    digest = metadata.get("base_digest")
    if not isinstance(digest, str) or not digest:
        raise UpdateError("expert metadata needs base_digest, the digest of the base model, as text")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found
