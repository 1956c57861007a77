"""Contents by their digest: whole or not there, resumable on their way in."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fedpeft.errors import LimitError, StateError, UpdateError
from fedpeft_server.store.blobs import BlobFolder

CONTENT = b"0123456789" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobFolder:
    return BlobFolder(tmp_path / "blobs")


def test_what_is_put_can_be_had(blobs: BlobFolder) -> None:
    assert blobs.put(CONTENT) == blobs.put(CONTENT) == DIGEST
    assert blobs.get(DIGEST) == CONTENT
    with blobs.reading(DIGEST) as content:
        assert content == CONTENT
    with pytest.raises(StateError, match="missing"):
        blobs.get("0" * 64)
    with pytest.raises(StateError, match="missing"), blobs.reading("0" * 64):
        pass


def test_an_upload_goes_on_where_the_last_one_broke_off(blobs: BlobFolder) -> None:
    first = blobs.begin(DIGEST, len(CONTENT))
    first.write(CONTENT[:4000])
    first.close()
    assert not blobs.has(DIGEST)
    again = BlobFolder(blobs.folder).begin(DIGEST, len(CONTENT))
    assert again.offset == 4000
    again.write(CONTENT[4000:])
    again.finish()
    assert blobs.get(DIGEST) == CONTENT
    assert list((blobs.folder / "incoming").iterdir()) == []


def test_other_bytes_than_announced_are_refused_and_forgotten(blobs: BlobFolder) -> None:
    partial = blobs.begin(DIGEST, len(CONTENT))
    partial.write(b"x" + CONTENT[1:])
    with pytest.raises(UpdateError, match="other bytes"):
        partial.finish()
    assert not blobs.has(DIGEST)
    fresh = blobs.begin(DIGEST, len(CONTENT))
    assert fresh.offset == 0
    with pytest.raises(UpdateError, match="more than the announced"):
        fresh.write(CONTENT + b"x")
    with pytest.raises(UpdateError, match="0 of 10000 bytes"):
        fresh.finish()
    fresh.close()


def test_more_on_disk_than_announced_is_begun_anew(blobs: BlobFolder) -> None:
    (blobs.folder / "incoming").mkdir()
    (blobs.folder / "incoming" / DIGEST).write_bytes(CONTENT + CONTENT)
    partial = blobs.begin(DIGEST, len(CONTENT))
    assert partial.offset == 0
    partial.write(CONTENT)
    partial.finish()
    assert blobs.get(DIGEST) == CONTENT


def test_two_uploads_of_one_content_at_a_time_are_one_too_many(blobs: BlobFolder) -> None:
    partial = blobs.begin(DIGEST, len(CONTENT))
    with pytest.raises(LimitError, match="another upload"):
        blobs.begin(DIGEST, len(CONTENT))
    partial.close()
    blobs.begin(DIGEST, len(CONTENT)).close()


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "0" * 63, "G" * 64])
def test_a_name_that_is_no_digest_is_refused(blobs: BlobFolder, name: str) -> None:
    with pytest.raises(UpdateError, match="no SHA-256"):
        blobs.begin(name, 1)


def test_what_nothing_refers_to_is_collected_after_a_while(blobs: BlobFolder) -> None:
    kept, gone = blobs.put(b"kept"), blobs.put(b"gone")
    left = blobs.path(kept).parent / ".partial-x"
    left.write_bytes(b"half")
    assert blobs.collect({kept}, older_than_s=60.0) == 0
    for path in (left, blobs.path(gone)):
        os.utime(path, (0, 0))
    assert blobs.collect({kept}, older_than_s=60.0) == 2
    assert blobs.has(kept)
    assert not blobs.has(gone)
