"""Whose a run is, and what others may do with it."""

from __future__ import annotations

from fedpeft.credentials import Identity, Role
from fedpeft.errors import CredentialError
from fedpeft_server.store import EVERYONE, StoredRun
from fedpeft_server.store.stored_run import no_such_run


def require_reader(who: Identity, stored: StoredRun) -> StoredRun:
    """Return a run that the caller may read: its submitter, those it named, and admins.

    Raises:
        UsageError: the caller may not, in the words for a run that isn't there.
    """
    if _owns(who, stored) or who.name in stored.readers or EVERYONE in stored.readers:
        return stored
    raise no_such_run(stored.id)


def require_owner(who: Identity, stored: StoredRun) -> StoredRun:
    """Return a run that the caller may stop and remove: its submitter and admins.

    Raises:
        UsageError: the caller may not even read it.
        CredentialError: the caller may read it, no more.
    """
    require_reader(who, stored)
    if not _owns(who, stored):
        raise CredentialError(
            f"run {stored.id} belongs to {stored.submitter!r}, who lets {who.name!r} read it and no more;"
            " ask them, or an admin"
        )
    return stored


def _owns(who: Identity, stored: StoredRun) -> bool:
    return who.role is Role.ADMIN or who.name == stored.submitter
