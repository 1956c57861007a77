"""The folder that provisioning makes: the authority, the server, and one folder for each device or person.

::

    DIR/ca/              stays where devices enrol, or offline
    DIR/server/          goes to the server
    DIR/agents/NAME/     goes to that device
    DIR/submitters/NAME/, DIR/admins/NAME/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from fedpeft.credentials.authority import Authority, create_authority, open_authority
from fedpeft.credentials.certificates import parse_certificate, read_certificate
from fedpeft.credentials.identity import Identity, Role, check_name
from fedpeft.credentials.issuing import host_names, server_hosts
from fedpeft.credentials.keys import new_key, private_folder
from fedpeft.credentials.material import (
    CERTIFICATE_FILE,
    REVOKED_FILE,
    Material,
    adopt,
    pending_key,
    write_material,
)
from fedpeft.errors import CredentialError
from fedpeft.runtime.files import folder_atomically, storage, write_atomically

AUTHORITY, SERVER = "ca", "server"
_FOLDERS = {Role.AGENT: "agents", Role.SUBMITTER: "submitters", Role.ADMIN: "admins"}


@dataclass(frozen=True)
class Issued:
    """A folder to copy to whom it is for.

    Attributes:
        folder: holds key, certificate and the authority's certificate.
        expires: the certificate's end.
    """

    identity: Identity
    folder: Path
    expires: datetime


@dataclass(frozen=True)
class Invitation:
    """A token to hand to whom it is for; the text is secret until it is used, and is not in the `repr`."""

    identity: Identity
    token: str
    expires: datetime

    def __repr__(self) -> str:
        return f"Invitation({self.identity}, expires={self.expires})"


def create_federation(folder: Path, hosts: Sequence[str], now: datetime) -> Authority:
    """Make a federation's folder with its authority and its server, whole or not at all.

    Raises:
        CredentialError: something is there already, or a host cannot be used.
        StorageError: it cannot be written.
    """
    with storage(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CredentialError(
                f"'{folder}' is not empty, and nothing in it is replaced; give a new folder, or leave out"
                " --host to add to the federation in it"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(folder, file_mode=None) as fresh:
        _new_server(create_authority(fresh / AUTHORITY, now), fresh / SERVER, hosts, now)
    private_folder(folder)
    return open_federation(folder)


def open_federation(folder: Path) -> Authority:
    """The authority of a federation's folder.

    Raises:
        CredentialError: there is none, or it cannot be used.
        StorageError: a file cannot be read.
    """
    if not (folder / AUTHORITY).is_dir():
        raise CredentialError(
            f"'{folder}' holds no federation; make one with: fedpeft provision DIR --host NAME"
        )
    return open_authority(folder / AUTHORITY)


def add_member(folder: Path, identity: Identity, now: datetime) -> Issued:
    """Make a member's folder, key included.

    Raises:
        CredentialError: the name is held or cannot be used.
        StorageError: it cannot be written.
    """
    authority = open_federation(folder)
    place = member_folder(folder, identity)
    check_free(folder, identity, now)
    _remove_folder(place)  # of one whose certificate has ended
    key = new_key()
    certificate = parse_certificate(authority.device(key.public_key(), identity, now), str(place))
    with storage(place.parent):
        place.parent.mkdir(exist_ok=True, mode=0o700)
    write_material(place, Material(key, certificate, authority.certificate))
    return Issued(identity, place, certificate.not_valid_after_utc)


def invite_member(folder: Path, identity: Identity, now: datetime, life: timedelta) -> Invitation:
    """A one-time token for a member, whose key will be made where it stays.

    Raises:
        CredentialError: the name is held by somebody, or name or life cannot be used.
        StorageError: its record cannot be written.
    """
    check_free(folder, identity, now)
    return Invitation(identity, open_federation(folder).tokens.invite(identity, now, life), now + life)


def check_free(folder: Path, identity: Identity, now: datetime) -> None:
    """Refuse a name that somebody holds or is invited to: replacing a device starts with revoking it.

    Raises:
        CredentialError: the name is taken or cannot be used.
    """
    check_name(identity.name)
    if is_held(open_federation(folder), identity.name, now):
        raise CredentialError(
            f"{identity.name!r} is there already; give another name, or first: fedpeft provision '{folder}'"
            f" --revoke {identity.name}"
        )


def is_held(authority: Authority, name: str, now: datetime) -> bool:
    """Whether somebody holds or is invited to a name.

    Raises:
        CredentialError: it cannot be used as a name.
        StorageError: the authority's records cannot be read.
    """
    invited = any(grant.identity.name == check_name(name) for grant in authority.tokens.outstanding(now))
    return invited or bool(authority.holds(name, now))


def renew_server(folder: Path, hosts: Sequence[str], now: datetime) -> list[str]:
    """Give the server a new key and certificate, for its hosts or for others; which they are.

    The old key goes on working until the old certificate ends: only its owner could revoke trust in it, by
    making a new authority.

    Raises:
        CredentialError: there is no server here, or a host cannot be used.
        StorageError: it cannot be written.
    """
    kept = check_hosts(folder, hosts)
    _new_server(open_federation(folder), folder / SERVER, kept, now)
    return kept


def check_revocable(folder: Path, name: str, now: datetime) -> None:
    """Refuse to revoke a name that has nothing, before anything is noted or changed.

    Raises:
        CredentialError: nobody has that name, or it cannot be used as one.
    """
    authority = open_federation(folder)
    places = _member_folders(folder, name)
    if not is_held(authority, name, now) and not any(place.is_dir() for place in places):
        raise authority.refuse_unknown(name, now)


def check_hosts(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Return the hosts that a renewed server has, these or its own, before anything is noted or changed.

    Raises:
        CredentialError: there is no federation or no server here, or a host cannot be used.
    """
    open_federation(folder)
    kept = list(hosts) or server_hosts(read_certificate(folder / SERVER / CERTIFICATE_FILE))
    host_names(kept)
    return kept


def revoke_member(folder: Path, name: str, now: datetime) -> int:
    """Revoke every certificate of a name and its tokens, and delete its folder here; how many of them.

    Raises:
        CredentialError: nobody has that name.
        StorageError: the list cannot be written.
    """
    authority = open_federation(folder)
    places = _member_folders(folder, name)
    left_over = any(place.is_dir() for place in places) and not is_held(authority, name, now)
    count = 0 if left_over else authority.revoke(name, now)
    if (folder / SERVER).is_dir():
        _copy_list(authority, folder / SERVER)
    for place in places:
        _remove_folder(place)
    return count


def _remove_folder(place: Path) -> None:
    with storage(place):
        if place.is_dir():
            for file in place.iterdir():
                file.unlink()
            place.rmdir()


def _member_folders(folder: Path, name: str) -> list[Path]:
    """Where the files of a name are, in whatever role."""
    return [member_folder(folder, Identity(check_name(name), role)) for role in Role]


def member_folder(folder: Path, identity: Identity) -> Path:
    """Where a member's files are made."""
    return folder / _FOLDERS[identity.role] / identity.name


def _new_server(authority: Authority, place: Path, hosts: Sequence[str], now: datetime) -> None:
    host_names(hosts)  # refused before a key is written
    certificate = authority.server(pending_key(place).public_key(), hosts, now)
    _copy_list(authority, place)
    adopt(place, certificate, authority.certificate)


def _copy_list(authority: Authority, place: Path) -> None:
    with storage(authority.revoked_file):
        content = authority.revoked_file.read_bytes()
    write_atomically(place / REVOKED_FILE, content)
