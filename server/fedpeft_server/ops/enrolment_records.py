"""Certificates that were given out, in the audit log before their holders get them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from fedpeft.credentials import identity_of
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.store.audit_log import Action, Actor, AuditLog
from fedpeft_server.transport.tls import Enrol

_REMEMBERED = 4096  # certificates


class RecordedEnrolment:
    """What `Enroll` does, recorded; a certificate that is asked for again is recorded once.

    Args:
        enrol: gives out certificates; the same one again for the same token and key.
    """

    def __init__(self, enrol: Enrol, audit: AuditLog) -> None:
        self._enrol, self._audit = enrol, audit
        self._lock = threading.Lock()
        self._recorded: OrderedDict[int, None] = OrderedDict()  # serial numbers

    def __call__(self, request: pb.EnrollRequest, context: Any) -> pb.EnrollReply:
        """Answer one request; on a thread. Raises what `enrol` does, and StorageError."""
        reply = self._enrol(request, context)
        certificate = parse_certificate(reply.certificate, "the issued certificate")
        serial, who = certificate.serial_number, identity_of(certificate)
        if serial not in self._recorded:
            action = Action.ENROLLED if request.token else Action.RENEWED
            self._audit.record(Actor(who.name, who.role), action, who.name, serial=f"{serial:x}")
            with self._lock:
                self._recorded[serial] = None
                while len(self._recorded) > _REMEMBERED:
                    self._recorded.popitem(last=False)
        return reply
