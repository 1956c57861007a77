"""The first start: a token becomes a certificate, whose key never leaves the device. Later ones: renewal."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path

import grpc

from fedpeft.credentials import (
    Material,
    expiry_warning,
    make_request,
    pin_authority,
    read_material,
    token_fingerprint,
    visitor_material,
)
from fedpeft.credentials.certificates import check_dates, parse_certificate, renewal_due, valid_until
from fedpeft.credentials.material import CERTIFICATE_FILE, adopt, pending_key
from fedpeft.errors import CredentialError, FederationError, FedPEFTError, ValidityError
from fedpeft.runtime.files import storage, write_atomically
from fedpeft.runtime.repeats import Repeats
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_client.transport.dialing import error_of, open_channel, pauses
from fedpeft_client.transport.egress import EgressLedger

LOG = logging.getLogger("fedpeft.client")
_DIAL_S, _ANSWER_S = 20.0, 30.0
_USED_FILE = "token.sha256"  # of the token that the certificate here came from
_NO_TOKEN = (
    "ends the handshake: no token waits there. This one has expired or was used or withdrawn, or the server"
    " runs without --authority; ask its admin for a new token"
)
_NOT_KNOWN = "ends the handshake: it does not trust this device's certificate; ask its admin for a token"


async def own_material(
    keys: Path,
    server: str,
    token: str,
    *,
    patience_s: float = 0.0,
    ledger: EgressLedger | None = None,
    refused: bool = False,
) -> Material:
    """Return the device's key and certificate: those in `keys`, or new ones for a token.

    A token is used where there is no certificate, where it has ended, or where the server refused it, and
    only once. A certificate that is valid stays, whatever token is given, and a line of the log says so.

    Args:
        patience_s: how long a server that does not answer is tried again. A clock that is wrong is waited for
            without end: it may be set any time, and a device without a battery begins with a wrong one.
        ledger: told of what is sent, before it is.
        refused: whether the server refused the certificate that is in `keys`.

    Raises:
        CredentialError: neither there nor to be had.
        FederationError: the server cannot be reached.
        StorageError: they cannot be written.
    """
    if not ((keys / CERTIFICATE_FILE).is_file() or token):
        raise CredentialError(
            f"{keys} holds no certificate; give the token that the federation's admin made: --token TOKEN"
        )
    began, repeats, usable = time.monotonic(), Repeats(), has_unused_token(keys, token)
    if usable and not refused and (end := valid_until(keys / CERTIFICATE_FILE, datetime.now(UTC))):
        LOG.info(
            "the token is not used: the certificate in %s is valid until %s; it is used once that has ended"
            " or the server refuses it",
            keys,
            f"{end:%Y-%m-%d}",
        )
        usable = False
    if usable:
        token_fingerprint(token)  # one that was cut is refused here: no server's answer is needed for that
    for pause in pauses(random.Random()):
        try:
            if not usable:
                return read_material(keys, datetime.now(UTC))
            return await _enrol(keys, server, token, ledger)
        except ValidityError as error:
            if repeats.due(str(error)):
                LOG.warning("%s; this is looked at again until then", error)
        except CredentialError as error:
            if refused or not (usable and (keys / CERTIFICATE_FILE).is_file()):
                raise
            usable = False
            LOG.warning("the token is not used, and the certificate that is here stays: %s", error)
            continue
        except FederationError as error:
            if time.monotonic() - began >= patience_s:
                raise
            if repeats.due(str(error)):
                LOG.warning("%s", error)
        await asyncio.sleep(pause)
    raise AssertionError("pauses never end")


def has_unused_token(keys: Path, token: str) -> bool:
    """Return whether a token was given that the folder's certificate, if there is one, did not come from.

    Raises:
        StorageError: the folder cannot be read.
    """
    return bool(token) and not ((keys / CERTIFICATE_FILE).is_file() and _was_used(keys, token))


def _was_used(keys: Path, token: str) -> bool:
    path = keys / _USED_FILE
    with storage(path):
        return path.is_file() and path.read_text().strip() == _digest(token)


def _digest(token: str) -> str:
    """What may be kept of a token: its 256 random bits cannot be guessed from it."""
    return hashlib.sha256(token.encode()).hexdigest()


async def _enrol(keys: Path, server: str, token: str, ledger: EgressLedger | None) -> Material:
    shown = await asyncio.to_thread(_fetch_server_certificate, server)
    authority, now = pin_authority(token, shown), datetime.now(UTC)
    check_dates(parse_certificate(shown, server), now, f"the server at {server}")
    visitor = visitor_material(authority)
    certificate = await _request_certificate(server, visitor, keys, token, _NO_TOKEN, ledger)
    LOG.info("enrolled; key and certificate are in %s", keys)
    material = adopt(keys, certificate, authority)
    write_atomically(keys / _USED_FILE, (_digest(token) + "\n").encode(), mode=0o600)
    check_dates(material.certificate, datetime.now(UTC), f"'{keys}'")
    return material


async def renew_if_due(keys: Path, server: str, ledger: EgressLedger | None = None) -> Material:
    """The device's key and certificate; fresh ones if two thirds of their life are over and they can be had.

    Raises:
        CredentialError: they have expired, or are not there.
    """
    material = read_material(keys, datetime.now(UTC))
    if not renewal_due(material.certificate, datetime.now(UTC)):
        return material
    try:
        certificate = await _request_certificate(server, material, keys, "", _NOT_KNOWN, ledger)
        LOG.info("the certificate was renewed")
        return adopt(keys, certificate, material.authority)
    except FedPEFTError as error:
        ending = expiry_warning(material.certificate, datetime.now(UTC), f"'{keys}'")
        LOG.warning("the certificate is not renewed yet: %s", error)
        if ending is not None:
            LOG.warning("%s, or ask the federation's admin for a token", ending)
        return material


async def _request_certificate(
    server: str, material: Material, keys: Path, token: str, refused: str, ledger: EgressLedger | None
) -> bytes:
    """The certificate for the pending key.

    Args:
        refused: what it means that a server which is there ends the handshake.
    """
    request = pb.EnrollRequest(
        protocol_version=NEWEST_PROTOCOL, token=token, csr=make_request(pending_key(keys))
    )
    if ledger is not None:
        ledger.record(request)
    async with open_channel(server, material) as channel:
        stub = rpc.FederationStub(channel)  # type: ignore[no-untyped-call]  # generated
        try:
            reply: pb.EnrollReply = await stub.Enroll(request, timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            known = error_of(error, server)
            unsaid = error.code() == grpc.StatusCode.UNAVAILABLE and type(known) is FederationError
            if unsaid and await asyncio.to_thread(_is_there, server):
                raise CredentialError(f"{server} {refused}") from error
            raise known from error
    return reply.certificate


def _is_there(server: str) -> bool:
    """Whether the server still shows its certificate: TLS 1.3 refuses a client's without saying so."""
    try:
        _fetch_server_certificate(server)
    except FederationError:
        return False
    return True


def _fetch_server_certificate(server: str) -> bytes:
    """What the server shows to whoever connects; nothing is sent to it, and nothing is believed yet."""
    host, _, port = server.rpartition(":")
    try:
        pem = ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=_DIAL_S)
    except (TimeoutError, OSError) as error:
        raise FederationError(
            f"{server} does not answer ({error}); check the address, and that fedpeft server runs there"
        ) from error
    return pem.encode()
