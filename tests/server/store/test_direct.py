"""Large files past the page cache hold the bytes that came, wherever an attempt was cut."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from fedpeft_server.store.blobs import BlobFolder
from fedpeft_server.store.direct import LEAST_BYTES, DirectAppender, reading_whole

BUFFER = 1 << 20
BODY = os.urandom(LEAST_BYTES + 70_001)


@pytest.mark.parametrize("cuts", [(), (1,), (4096, BUFFER), (BUFFER - 1, BUFFER + 1, 3 * BUFFER + 5000)])
def test_attempts_go_on_at_any_byte(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    path = tmp_path / "file"
    path.touch()
    for start, end in zip((0, *cuts), (*cuts, len(BODY)), strict=True):
        appender = DirectAppender(path, start)
        for at in range(start, end, 300_007):
            appender.write(BODY[at : min(end, at + 300_007)])
        appender.rest()
        appender.close()
        assert path.stat().st_size == end
    assert path.read_bytes() == BODY
    with reading_whole(path) as content:
        assert content == BODY


def test_what_a_killed_attempt_leaves_are_whole_buffers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    appender = DirectAppender(path, 0)
    appender.write(BODY[: 2 * BUFFER + 12_345])
    appender.close()  # without the rest, as a kill does
    assert path.read_bytes() == BODY[: 2 * BUFFER]


@pytest.mark.parametrize("size", [0, 10, LEAST_BYTES - 1, LEAST_BYTES, LEAST_BYTES + 4096])
def test_a_whole_file_of_any_size_is_read(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(BODY[:size])
    with reading_whole(tmp_path / "file") as content:
        assert content == BODY[:size]


def test_where_the_system_cannot_go_past_its_cache_files_are_whole_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(os, "preadv", refused)
    (tmp_path / "file").write_bytes(BODY)
    with reading_whole(tmp_path / "file") as content:
        assert content == BODY


def test_a_large_upload_that_was_put_aside_goes_on_and_is_whole(tmp_path: Path) -> None:
    blobs, digest = BlobFolder(tmp_path), hashlib.sha256(BODY).hexdigest()
    first = blobs.begin(digest, len(BODY))
    first.write(BODY[: BUFFER + 17])
    first.close()
    again = blobs.begin(digest, len(BODY))
    assert again.offset == BUFFER + 17
    again.write(BODY[again.offset :])
    again.finish()
    with blobs.reading(digest) as content:
        assert content == BODY
