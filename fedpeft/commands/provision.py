"""`fedpeft provision`: the keys and certificates of a federation, and what to copy where."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.credentials import (
    Authority,
    Identity,
    Role,
    check_name,
    expiry_warning,
    fingerprint,
    identity_of,
)
from fedpeft.credentials.actions import note_action
from fedpeft.credentials.certificates import read_certificate
from fedpeft.credentials.federation import (
    AUTHORITY,
    SERVER,
    Invitation,
    Issued,
    add_member,
    check_free,
    check_hosts,
    check_revocable,
    create_federation,
    invite_member,
    open_federation,
    renew_server,
    revoke_member,
)
from fedpeft.credentials.issuing import server_hosts
from fedpeft.credentials.material import CERTIFICATE_FILE
from fedpeft.errors import UsageError


@dataclass(frozen=True)
class ProvisionRequest:
    """The options of one call."""

    hosts: Sequence[str]
    members: Sequence[Identity]
    tokens: bool
    token_life: timedelta
    renew_server: bool
    revoke: Sequence[str]


@dataclass(frozen=True)
class ProvisionResult:
    """What one call did: only tokens in it are secret, and only they are meant to be shown."""

    created: bool = False
    renewed_hosts: Sequence[str] = ()
    issued: Sequence[Issued] = ()
    invited: Sequence[Invitation] = ()
    revoked: Sequence[str] = ()


def provision_command(folder: Path, asked: ProvisionRequest, *, as_json: bool) -> None:
    """Make a federation's folder, add to it, renew its server, revoke in it, or say what is in it.

    Raises:
        UsageError: options that exclude each other.
        CredentialError: something would be overwritten, or a name, host or file cannot be used.
        StorageError: a file cannot be written.
    """
    _check(asked)
    now = datetime.now(UTC)
    done = _do(folder, asked, now)
    authority = open_federation(folder)
    if as_json:
        print(json.dumps(_plain(folder, authority, done, now), sort_keys=True))
    else:
        _show(folder, authority, done, now)


def members_named(agents: Sequence[str], submitters: Sequence[str], admins: Sequence[str]) -> list[Identity]:
    """The members that the options name.

    Raises:
        UsageError: a name twice: a name is one device.
        CredentialError: a name that cannot be used.
    """
    members = [
        Identity(check_name(name), role)
        for role, names in ((Role.AGENT, agents), (Role.SUBMITTER, submitters), (Role.ADMIN, admins))
        for name in names
    ]
    seen: set[str] = set()
    for member in members:
        if member.name in seen:
            raise UsageError(f"{member.name!r} is named twice; a name is one device and has one role")
        seen.add(member.name)
    return members


def _check(asked: ProvisionRequest) -> None:
    if asked.revoke and (asked.hosts or asked.members or asked.renew_server or asked.tokens):
        raise UsageError("--revoke goes alone; give the other options in a second call")
    if asked.tokens and not asked.members:
        raise UsageError(
            "--tokens needs to know for whom; add --agent NAME, --submitter NAME or --admin NAME"
        )


def _do(folder: Path, asked: ProvisionRequest, now: datetime) -> ProvisionResult:
    authority = folder / AUTHORITY
    if asked.revoke:
        for name in asked.revoke:
            check_revocable(folder, name, now)
            note_action(authority, "revoked", name, now)
            revoke_member(folder, name, now)
        return ProvisionResult(revoked=asked.revoke)
    created = bool(asked.hosts) and not asked.renew_server
    if created:
        create_federation(folder, asked.hosts, now)
        note_action(authority, "created", "", now)
    if asked.renew_server:
        check_hosts(folder, asked.hosts)
        note_action(authority, "renewed", SERVER, now, SERVER)
    renewed = renew_server(folder, asked.hosts, now) if asked.renew_server else ()
    for member in asked.members:  # all are checked before the first is made
        check_free(folder, member, now)
    for member in asked.members:
        note_action(authority, "invited" if asked.tokens else "issued", member.name, now, member.role)
    if asked.tokens:
        invited = [invite_member(folder, member, now, asked.token_life) for member in asked.members]
        return ProvisionResult(created, renewed, invited=invited)
    return ProvisionResult(
        created, renewed, issued=[add_member(folder, member, now) for member in asked.members]
    )


def _plain(folder: Path, authority: Authority, done: ProvisionResult, now: datetime) -> dict[str, Any]:
    server = read_certificate(folder / SERVER / CERTIFICATE_FILE)
    return {
        "folder": str(folder),
        "fingerprint_sha256": fingerprint(authority.certificate).hex(),
        "created": done.created,
        "server": {
            "folder": str(folder / SERVER),
            "hosts": server_hosts(server),
            "expires": server.not_valid_after_utc.isoformat(),
            "renewed": bool(done.renewed_hosts),
        },
        "issued": [{**_member(i.identity, i.expires), "folder": str(i.folder)} for i in done.issued],
        "tokens": [{**_member(i.identity, i.expires), "token": i.token} for i in done.invited],
        "revoked": list(done.revoked),
        "members": [_member(identity_of(c), c.not_valid_after_utc) for c in authority.list_issued(now)],
        "outstanding_tokens": [_member(g.identity, g.expires) for g in authority.tokens.outstanding(now)],
        "warnings": _warnings(folder, authority, now),
    }


def _member(identity: Identity, expires: datetime) -> dict[str, str]:
    return {"name": identity.name, "role": str(identity.role), "expires": expires.isoformat()}


def _warnings(folder: Path, authority: Authority, now: datetime) -> list[str]:
    server = read_certificate(folder / SERVER / CERTIFICATE_FILE)
    lines = [
        expiry_warning(authority.certificate, now, "the authority"),
        expiry_warning(server, now, f"the server (fedpeft provision '{folder}' --renew-server)"),
        *(expiry_warning(c, now, f"{identity_of(c).name!r}") for c in authority.list_issued(now)),
    ]
    return [line for line in lines if line is not None]


def _show(folder: Path, authority: Authority, done: ProvisionResult, now: datetime) -> None:
    console = Console(file=sys.stdout, highlight=False)
    print(f"authority  SHA-256 {fingerprint(authority.certificate).hex()}")
    if done.revoked:
        print(
            f"revoked    {', '.join(done.revoked)}; a running server with this ca/ refuses them from now on"
        )
        print(f"           elsewhere, copy {folder / SERVER / 'revoked.pem'} over the server's")
        return
    _table(console, ("what", "copy to", "expires"), _copies(folder, done))
    for invitation in done.invited:
        print(
            f"token      {invitation.identity.name} ({invitation.identity.role}), once, until"
            f" {invitation.expires:%Y-%m-%d %H:%M} UTC:\n{invitation.token}"
        )
    if done.issued:
        print("each folder holds a private key: copy it over a safe channel, then delete it here")
    if not (done.created or done.renewed_hosts or done.issued or done.invited):
        _table(console, ("member", "role", "expires"), _members(folder, authority, now))
    for line in _warnings(folder, authority, now):
        print(f"warning: {line}", file=sys.stderr)


def _copies(folder: Path, done: ProvisionResult) -> list[tuple[str, str, str]]:
    rows = []
    if done.created:
        rows.append((f"{folder / AUTHORITY}", "the server, if devices enrol there; else nowhere", ""))
    if done.created or done.renewed_hosts:
        server = read_certificate(folder / SERVER / CERTIFICATE_FILE)
        where = f"the server, {', '.join(server_hosts(server))}"
        rows.append((f"{folder / SERVER}", where, f"{server.not_valid_after_utc:%Y-%m-%d}"))
    return rows + [
        (f"{item.folder}", f"{item.identity.role} {item.identity.name}", f"{item.expires:%Y-%m-%d}")
        for item in done.issued
    ]


def _members(folder: Path, authority: Authority, now: datetime) -> list[tuple[str, str, str]]:
    server = read_certificate(folder / SERVER / CERTIFICATE_FILE)
    rows = [(", ".join(server_hosts(server)), "server", f"{server.not_valid_after_utc:%Y-%m-%d}")]
    for certificate in authority.list_issued(now):
        identity = identity_of(certificate)
        rows.append((identity.name, str(identity.role), f"{certificate.not_valid_after_utc:%Y-%m-%d}"))
    for grant in authority.tokens.outstanding(now):
        role = f"{grant.identity.role}, invited"
        rows.append((grant.identity.name, role, f"{grant.expires:%Y-%m-%d %H:%M}"))
    return rows


def _table(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
