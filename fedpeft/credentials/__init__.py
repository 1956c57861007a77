"""Who is who: a private certificate authority, enrolment tokens, revocation, and signed updates.

The only room that imports `cryptography`. It opens no sockets: what goes to gRPC is PEM bytes.

On a server::

    material = read_material(folder, now)               # key_pem, certificate_pem, authority_pem
    authority = open_authority(ca_folder)               # only where devices enrol and renew at this server
    roots = client_roots(material.authority, visitors=authority.tokens.open_at(now))   # PEM
    peers = PeerCheck(material.authority, authority.revoked_file)     # or folder / REVOKED_FILE
    who = peers.identity(peer_pem, now)                 # name and role of the caller, or CredentialError
    require_role(who, Role.SUBMITTER)
    certificate_pem = authority.enrol(token_text, request_pem, now)   # the one call without peers.identity
    certificate_pem = authority.renew(peer_pem, request_pem, now)
    text = authority.tokens.invite(Identity(name, Role.AGENT), now, life)

On a device::

    authority = pinned_authority(token_text, leaf_pem)  # leaf: what ssl.get_server_certificate gives
    visitor = visitor_material(authority)               # dials the one call that takes a token
    request_pem = make_request(pending_key(folder))
    material = adopt(folder, certificate_pem, authority)
    material = read_material(folder, now)               # every later start
    renewal_due(material.certificate, now)              # then the last three steps again

Updates::

    header = UpdateHeader(run_id, run_digest, round, kind, client)
    signature = sign_update(material.key, header, body)
    verify_update(certificate, header, body, signature)

Times are aware UTC datetimes, passed in by the caller.
"""

from fedpeft.credentials.authority import Authority, create_authority, open_authority
from fedpeft.credentials.certificates import (
    expiry_warning,
    fingerprint,
    read_certificate,
    renewal_due,
)
from fedpeft.credentials.enrolment import client_roots, pin_authority, visitor_material
from fedpeft.credentials.identity import Identity, Role, check_name, identity_of, require_role
from fedpeft.credentials.keys import new_key, read_key, write_key
from fedpeft.credentials.material import (
    REVOKED_FILE,
    Material,
    adopt,
    pending_key,
    read_material,
    write_material,
)
from fedpeft.credentials.peers import PeerCheck
from fedpeft.credentials.requests import make_request
from fedpeft.credentials.revocation import Revocations, read_revocations
from fedpeft.credentials.signing import (
    UpdateHeader,
    sign_body_digest,
    sign_update,
    verify_body_digest,
    verify_update,
)
from fedpeft.credentials.tokens import Grant, Tokens, token_fingerprint

__all__ = [
    "REVOKED_FILE",
    "Authority",
    "Grant",
    "Identity",
    "Material",
    "PeerCheck",
    "Revocations",
    "Role",
    "Tokens",
    "UpdateHeader",
    "adopt",
    "check_name",
    "client_roots",
    "create_authority",
    "expiry_warning",
    "fingerprint",
    "identity_of",
    "make_request",
    "new_key",
    "open_authority",
    "pending_key",
    "pin_authority",
    "read_certificate",
    "read_key",
    "read_material",
    "read_revocations",
    "renewal_due",
    "require_role",
    "sign_body_digest",
    "sign_update",
    "token_fingerprint",
    "verify_body_digest",
    "verify_update",
    "visitor_material",
    "write_key",
    "write_material",
]
