"""One round in one file: back as it went, or refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from fedpeft.errors import StateError, StorageError
from fedpeft.ledger import Checkpoint
from fedpeft.ledger.checkpoint import read_checkpoint, write_checkpoint
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.updates.update import Layout, Update, arrays_digest, layout_of
from tests.core.strategies import several

DIGEST = "ab" * 32
ROW = Round(round=3, train_loss=0.1 + 0.2, outcomes=(ClientOutcome(client="ü", status="folded", loss=1.5),))


def checkpoint(update: Update, row: Round = ROW) -> Checkpoint:
    return Checkpoint(
        DIGEST,
        row.round,
        update.arrays,
        row,
        strategy={"momentum/a": np.array([1e-300, -0.0]), "step": np.array(7, np.int64)},
        clients={"hospital/2/residual": np.ones((2, 0), np.float32)},
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "round-000003.safetensors"
    write_checkpoint(path, checkpoint(Update({"a": np.arange(4, dtype=np.float32)})))
    return path


@given(several(1, 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_what_is_written_is_read(tmp_path: Path, case: tuple[Layout, list[Update]]) -> None:
    layout, (update,) = case
    written = checkpoint(update)
    write_checkpoint(tmp_path / "c", written)
    came = read_checkpoint(tmp_path / "c", DIGEST)
    assert (came.run_digest, came.round, came.row) == (DIGEST, 3, ROW)
    assert layout_of(came.state) == layout
    for before, after in (
        (written.state, came.state),
        (written.strategy, came.strategy),
        (written.clients, came.clients),
    ):
        assert layout_of(after) == layout_of(before)
        assert arrays_digest(after) == arrays_digest(before)


def test_one_changed_byte_anywhere_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= (0x01, 0x20, 0xFF)[position % 3]
        file.write_bytes(changed)
        with pytest.raises(StateError):
            read_checkpoint(file, DIGEST)
    file.write_bytes(whole)
    assert read_checkpoint(file, DIGEST).round == 3


def test_a_file_cut_short_anywhere_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(StateError, match="corrupt"):
            read_checkpoint(file, DIGEST)
    file.write_bytes(whole + b"\0")
    with pytest.raises(StateError):
        read_checkpoint(file, DIGEST)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_noticed(tmp_path: Path, seed: int) -> None:
    (tmp_path / "c").write_bytes(random.Random(seed).randbytes(300))
    with pytest.raises(StateError, match="corrupt"):
        read_checkpoint(tmp_path / "c", DIGEST)


def test_a_foreign_run_is_refused(file: Path) -> None:
    with pytest.raises(StateError, match="is of run abababababab, the run file is cdcd"):
        read_checkpoint(file, "cd" * 32)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        read_checkpoint(tmp_path / "none", DIGEST)
