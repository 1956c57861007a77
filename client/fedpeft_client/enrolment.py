"""The first start: a token becomes a certificate, whose key never leaves the device. Later ones: renewal."""

from __future__ import annotations

import asyncio
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
    pinned_authority,
    read_material,
    visitor_material,
)
from fedpeft.credentials.certificates import renewal_due
from fedpeft.credentials.material import CERTIFICATE_FILE, adopt, pending_key
from fedpeft.errors import CredentialError, FederationError, FedPEFTError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft_client.dialing import error_of, open_channel, pauses
from fedpeft_client.egress import EgressLedger

LOG = logging.getLogger("fedpeft.client")
PROTOCOL_VERSION = 1
_DIAL_S, _ANSWER_S = 20.0, 30.0
_NO_TOKEN = (
    "ends the handshake: no token waits there. This one has expired or was used or withdrawn, or the server"
    " runs without --authority; ask its admin for a new token"
)
_NOT_KNOWN = "ends the handshake: it does not trust this device's certificate; ask its admin for a token"


async def own_material(
    keys: Path, server: str, token: str, *, patience_s: float = 0.0, ledger: EgressLedger | None = None
) -> Material:
    """The device's key and certificate: those in `keys`, or new ones for a token.

    Args:
        patience_s: how long a server that does not answer is tried again.
        ledger: told of what is sent, before it is.

    Raises:
        CredentialError: neither there nor to be had.
        FederationError: the server cannot be reached.
        StorageError: they cannot be written.
    """
    if (keys / CERTIFICATE_FILE).is_file():
        return read_material(keys, datetime.now(UTC))
    if not token:
        raise CredentialError(
            f"{keys} holds no certificate; give the token that the federation's admin made: --token TOKEN"
        )
    began = time.monotonic()
    for pause in pauses(random.Random()):
        try:
            return await _enrolled(keys, server, token, ledger)
        except FederationError as error:
            if time.monotonic() - began >= patience_s:
                raise
            LOG.warning("%s", error)
        await asyncio.sleep(pause)
    raise AssertionError("pauses never end")


async def _enrolled(keys: Path, server: str, token: str, ledger: EgressLedger | None) -> Material:
    authority = pinned_authority(token, await asyncio.to_thread(_shown_certificate, server))
    visitor = visitor_material(authority, datetime.now(UTC))
    certificate = await _asked(server, visitor, keys, token, _NO_TOKEN, ledger)
    LOG.info("enrolled; key and certificate are in %s", keys)
    return adopt(keys, certificate, authority)


async def renewed(keys: Path, server: str, ledger: EgressLedger | None = None) -> Material:
    """The device's key and certificate; fresh ones if two thirds of their life are over and they can be had.

    Raises:
        CredentialError: they have expired, or are not there.
    """
    material = read_material(keys, datetime.now(UTC))
    if not renewal_due(material.certificate, datetime.now(UTC)):
        return material
    try:
        certificate = await _asked(server, material, keys, "", _NOT_KNOWN, ledger)
        LOG.info("the certificate was renewed")
        return adopt(keys, certificate, material.authority)
    except FedPEFTError as error:
        ending = expiry_warning(material.certificate, datetime.now(UTC), f"'{keys}'")
        LOG.warning("the certificate is not renewed yet: %s", error)
        if ending is not None:
            LOG.warning("%s, or ask the federation's admin for a token", ending)
        return material


async def _asked(
    server: str, material: Material, keys: Path, token: str, refused: str, ledger: EgressLedger | None
) -> bytes:
    """The certificate for the pending key.

    Args:
        refused: what it means that a server which is there ends the handshake.
    """
    request = pb.EnrollRequest(
        protocol_version=PROTOCOL_VERSION, token=token, csr=make_request(pending_key(keys))
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
        _shown_certificate(server)
    except FederationError:
        return False
    return True


def _shown_certificate(server: str) -> bytes:
    """What the server shows to whoever connects; nothing is sent to it, and nothing is believed yet."""
    host, _, port = server.rpartition(":")
    try:
        pem = ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=_DIAL_S)
    except (TimeoutError, OSError) as error:
        raise FederationError(
            f"{server} does not answer ({error}); check the address, and that fedpeft server runs there"
        ) from error
    return pem.encode()
