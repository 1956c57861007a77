"""`.fpz` files: the same tensors come back, and nothing else is accepted."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from fedpeft.codec import (
    DenseTensor,
    Encoded,
    Expert,
    PublicSource,
    ReadBounds,
    StdScale,
    dare,
    identical,
    quantise,
    read_expert,
    sign_with_scale,
    ternarise,
    top_k,
    write_expert,
)
from fedpeft.errors import StorageError, UpdateError


def expert() -> Expert:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((12, 20)).astype(np.float32)
    tensors: dict[str, Encoded] = {
        "b.lora_A.weight": ternarise(delta, 0.1, StdScale()),
        "a.lora_B.weight": top_k(delta, 0.1),
        "blöck": quantise(delta, 4, rng, 0),
        "signs": sign_with_scale(delta),
        "dare": dare(delta, 0.9, PublicSource(1, 2, 3)),
        "dense": DenseTensor(delta),
        "scalar": DenseTensor(np.array(2.5, dtype=np.float32)),
    }
    return Expert({"base_digest": "sha256:ab", "peft": {"r": 8, "alpha": 1.5}, "note": "ü"}, tensors)


@pytest.mark.parametrize("coder", ["rans", "golomb"])
def test_reading_gives_what_was_written(tmp_path: Path, coder: str) -> None:
    path = tmp_path / "expert.fpz"
    written = write_expert(path, expert(), coder)
    assert path.stat().st_size == written
    back = read_expert(path)
    assert back.metadata == expert().metadata
    assert back.base_digest == "sha256:ab"
    assert list(back.tensors) == list(expert().tensors)
    assert all(identical(back.tensors[name], tensor) for name, tensor in expert().tensors.items())


def test_the_same_expert_gives_the_same_bytes_and_leaves_no_temporary(tmp_path: Path) -> None:
    first, second = tmp_path / "1.fpz", tmp_path / "2.fpz"
    write_expert(first, expert())
    write_expert(second, expert())
    write_expert(second, expert())
    assert first.read_bytes() == second.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1.fpz", "2.fpz"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "expert.fpz"
    write_expert(path, expert())
    before = path.read_bytes()
    with pytest.raises(UpdateError, match="plain JSON"):
        write_expert(path, Expert({"base_digest": "x", "when": object()}, expert().tensors))
    with pytest.raises(UpdateError, match="plain JSON"):
        write_expert(path, Expert({"base_digest": "x", "loss": float("nan")}, expert().tensors))
    with pytest.raises(UpdateError, match="base_digest"):
        write_expert(path, Expert({}, expert().tensors))
    with pytest.raises(UpdateError, match="without tensors"):
        write_expert(path, Expert({"base_digest": "x"}, {}))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["expert.fpz"]


def test_unusable_paths_are_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"expert\.fpz: No such file.*; check the path"):
        write_expert(tmp_path / "missing" / "expert.fpz", expert())
    with pytest.raises(StorageError, match="cannot read"):
        read_expert(tmp_path / "missing.fpz")
    with pytest.raises(StorageError, match="cannot read"):
        read_expert(tmp_path)


def test_damage_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "expert.fpz"
    write_expert(path, expert())
    honest = path.read_bytes()
    for at in range(0, len(honest), 41):
        changed = bytearray(honest)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(UpdateError, match=r"expert\.fpz"):
            read_expert(path)
        path.write_bytes(honest[:at])
        with pytest.raises(UpdateError, match=r"expert\.fpz"):
            read_expert(path)
    path.write_bytes(honest + b"\0")
    with pytest.raises(UpdateError, match="digest"):
        read_expert(path)


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "expert.fpz"
    size = write_expert(path, expert())
    with pytest.raises(UpdateError, match="at most 100 are accepted"):
        read_expert(path, ReadBounds(max_bytes=100))
    # Six tensors of 240 elements and a scalar: the sum is bounded, not each alone.
    with pytest.raises(UpdateError, match="elements are accepted"):
        read_expert(path, ReadBounds(max_elements=6 * 240))
    assert len(read_expert(path, ReadBounds(size, 6 * 240 + 1)).tensors) == 7


def forged(index: object, body: bytes = b"", version: int = 1) -> bytes:
    raw = index if isinstance(index, bytes) else json.dumps(index).encode()
    content = struct.pack("<8sII", b"\x89FPZ\r\n\x1a\n", version, len(raw)) + raw + body
    return content + hashlib.sha256(content).digest()


META = {"base_digest": "x"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"PK\x03\x04" + bytes(60), "not an expert file"),
        (forged({}, version=2), "version 2"),
        (forged(b"{"), "not JSON"),
        (forged(b"[" * 100_000), "not JSON"),
        (forged(b'{"metadata": {"base_digest": "x", "n": NaN}, "tensors": [["a", 1]]}'), "not JSON"),
        (forged(b'{"metadata": {}, "metadata": {}, "tensors": []}'), "twice"),
        (forged([]), "exactly the keys"),
        (forged({"metadata": META, "tensors": []}), "at least one tensor"),
        (forged({"metadata": {}, "tensors": [["a", 0]]}), "base_digest"),
        (forged({"metadata": META, "tensors": [["a"]]}), "name, length"),
        (forged({"metadata": META, "tensors": [["a", True]]}), "name, length"),
        (forged({"metadata": META, "tensors": [["a", 0], ["a", 0]]}), "twice"),
        (forged({"metadata": META, "tensors": [["a", -1], ["b", 1]]}), "other lengths"),
        (forged({"metadata": META, "tensors": [["a", 5]]}, b"1234"), "other lengths"),
        (forged({"metadata": META, "tensors": [["a", 4]]}, b"1234"), "truncated"),
    ],
)
def test_forged_files_with_a_right_digest_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "forged.fpz"
    path.write_bytes(data)
    with pytest.raises(UpdateError, match=message):
        read_expert(path)
