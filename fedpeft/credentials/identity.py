"""Names and roles, and how a certificate states them.

A certificate says both in one subject alternative name, the URI ``fedpeft://ROLE/NAME``. A URI is a standard
field, so every certificate tool shows it and TLS stacks hand it on; it binds role and name into one string,
so neither can be read without the other; and it cannot be mistaken for an organisation's own department, as
the OU could, nor be dropped as an unknown extension.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from cryptography import x509

from fedpeft.errors import CredentialError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SCHEME = "fedpeft://"


class Role(StrEnum):
    """What a certificate's holder may do."""

    AGENT = "agent"  # trains, on its own data only
    SUBMITTER = "submitter"  # submits, watches, stops and pulls runs
    ADMIN = "admin"  # that, and invites and revokes devices


# An admin may do what a submitter may. Nobody but an agent may send updates: a stolen admin certificate must
# not be able to speak for data.
_COVERS: dict[Role, frozenset[Role]] = {
    Role.AGENT: frozenset({Role.AGENT}),
    Role.SUBMITTER: frozenset({Role.SUBMITTER}),
    Role.ADMIN: frozenset({Role.ADMIN, Role.SUBMITTER}),
}


@dataclass(frozen=True)
class Identity:
    """Who holds a certificate: a name of `check_name`'s form and one role."""

    name: str
    role: Role

    @property
    def uri(self) -> str:
        """The subject alternative name that says it."""
        return f"{_SCHEME}{self.role}/{self.name}"


def check_name(name: str) -> str:
    """The name, if it can stand in a certificate, a file name and a log line as it is.

    Raises:
        CredentialError: empty, longer than 63, or characters other than letters, digits, ``.``, ``_``, ``-``.
    """
    if not _NAME.fullmatch(name):
        raise CredentialError(
            f"name {name[:80]!r} cannot be used; give 1 to 63 letters, digits, '.', '_' or '-', the first a"
            " letter or a digit"
        )
    return name


def identity_of(certificate: x509.Certificate) -> Identity:
    """What a device certificate says; whether it is to be believed is `PeerCheck`'s matter.

    Raises:
        CredentialError: no name and role of ours in it, or more than one.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        uris = []
    ours = [uri for uri in uris if uri.startswith(_SCHEME)]
    role, slash, name = ours[0].removeprefix(_SCHEME).partition("/") if len(ours) == 1 else ("", "", "")
    if not slash or role not in set(Role) or not _NAME.fullmatch(name):
        raise CredentialError(
            "the certificate states no name and role of this federation; enrol with a token of its admin"
        )
    return Identity(name, Role(role))


def require_role(who: Identity, role: Role) -> None:
    """Refuse a caller whose role does not cover `role`.

    Raises:
        CredentialError: naming both roles.
    """
    if role not in _COVERS[who.role]:
        raise CredentialError(
            f"{who.name!r} is {who.role}, and this needs {role}; use a certificate with that role"
        )
