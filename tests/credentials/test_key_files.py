"""Keys on the disk: theirs alone, whole or not there, and in no message."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedpeft.credentials import (
    Authority,
    adopt,
    make_request,
    new_key,
    pending_key,
    read_key,
    read_material,
    write_key,
    write_material,
)
from fedpeft.credentials.keys import key_pem
from fedpeft.errors import CredentialError
from tests.credentials.federation import AGENT, NOW, member


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_its_owners_alone(authority: Authority, tmp_path: Path) -> None:
    device = member(authority)
    write_material(tmp_path / "device", device)
    assert mode(tmp_path / "device") == 0o700
    assert mode(tmp_path / "device" / "key.pem") == 0o600
    assert mode(authority.folder) == 0o700
    assert mode(authority.folder / "key.pem") == 0o600
    found = read_material(tmp_path / "device", NOW)
    assert (found.key_pem, found.certificate) == (device.key_pem, device.certificate)


@pytest.mark.parametrize("wide", [0o640, 0o604, 0o644, 0o660, 0o666, 0o610])
def test_a_key_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path, wide: int) -> None:
    path = tmp_path / "key.pem"
    write_key(path, new_key())
    path.chmod(wide)
    with pytest.raises(CredentialError, match=rf"mode is {wide:04o}.*chmod 600"):
        read_key(path)
    path.chmod(0o400)
    read_key(path)


def test_what_is_no_key_of_ours_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    encodings = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    locked = new_key().private_bytes(*encodings, serialization.BestAvailableEncryption(b"secret"))
    bare = serialization.NoEncryption()
    contents = [
        b"",
        b"hello",
        locked,
        rsa.generate_private_key(65537, 1024).private_bytes(*encodings, bare),
        ec.generate_private_key(ec.SECP384R1()).private_bytes(*encodings, bare),
        key_pem(new_key())[:100],
    ]
    for content in contents:
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(CredentialError, match="no unencrypted P-256 key") as refused:
            read_key(path)
        assert not content or content.decode() not in str(refused.value)
    path.unlink()
    with pytest.raises(CredentialError, match="there is no key"):
        read_key(path)


def test_a_folder_of_mixed_files_is_refused(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "device"
    write_material(folder, member(authority))
    write_key(folder / "key.pem", new_key())
    with pytest.raises(CredentialError, match="key is not the certificate's"):
        read_material(folder, NOW)
    (folder / "certificate.pem").unlink()
    with pytest.raises(CredentialError, match="there is no certificate"):
        read_material(folder, NOW)


def test_nothing_shows_a_key(authority: Authority) -> None:
    device = member(authority)
    secrets = [
        line for key in (device.key, authority.key) for line in key_pem(key).decode().split("\n")[1:-2]
    ]
    secrets += [f"{key.private_numbers().private_value}" for key in (device.key, authority.key)]
    for text in (repr(device), str(device), f"{device}", repr(authority), f"{authority}"):
        assert not any(secret in text for secret in secrets)


def test_a_device_that_is_killed_while_it_enrols_asks_again_with_the_same_key(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "device"
    assert key_pem(pending_key(folder)) == key_pem(pending_key(folder))
    assert mode(folder / "next-key.pem") == 0o600


def test_a_rotation_that_is_cut_short_leaves_the_old_pair_or_the_new_one(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "device"
    old = member(authority)
    write_material(folder, old)
    fresh = pending_key(folder)
    assert read_material(folder, NOW).key_pem == old.key_pem  # cut before the answer came
    pem = authority.device(fresh.public_key(), AGENT, NOW)
    (folder / "certificate.pem").write_bytes(pem)  # cut between certificate and key
    assert read_material(folder, NOW).key_pem == key_pem(fresh)
    assert not (folder / "next-key.pem").exists()


def test_an_answer_for_another_key_is_not_adopted(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "device"
    old = member(authority)
    write_material(folder, old)
    make_request(pending_key(folder))
    with pytest.raises(CredentialError, match="key is not the certificate's"):
        adopt(folder, old.certificate_pem, authority.certificate)
    assert read_material(folder, NOW).certificate == old.certificate
