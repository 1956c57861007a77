"""`fedpeft server invite | revoke`: who is a member, from anywhere, by the server's own authority."""

from __future__ import annotations

import json
import time

from fedpeft.reporting.text import printable
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.transport.admin_client import AdminClient, run_and_answer


def invite_command(desk: AdminClient, name: str, role: str, valid_s: int, *, as_json: bool) -> None:
    """Print a one-time token for somebody.

    Raises:
        FedPEFTError: what the server answered.
    """
    request = pb.IssueTokenRequest(name=name, role=role, valid_s=valid_s)
    reply = run_and_answer(desk.call(lambda stub: stub.IssueToken(request)))
    if as_json:
        table = {"name": name, "role": role, "token": reply.token, "expires": reply.expires_ms / 1000}
        print(json.dumps(table))
        return
    ends = time.strftime("%Y-%m-%d %H:%M", time.gmtime(reply.expires_ms / 1000))
    print(f"token      {name} ({role}), once, until {ends} UTC:\n{printable(reply.token)}")


def revoke_command(desk: AdminClient, name: str, reason: str, *, as_json: bool) -> None:
    """End at once what a name may do.

    Raises:
        FedPEFTError: what the server answered.
    """
    request = pb.RevokeAgentRequest(name=name, reason=reason)
    reply = run_and_answer(desk.call(lambda stub: stub.RevokeAgent(request)))
    if as_json:
        print(json.dumps({"name": name, "revoked": reply.revoked}))
    else:
        print(f"revoked    {name}")
