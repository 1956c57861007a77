"""The stage that changes nothing: the onion's neutral element, for tests and for measuring overhead."""

from __future__ import annotations

from typing import ClassVar

from fedpeft.config.sections import Section
from fedpeft.stages.base import Role, StageContext
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload


class IdentityStage(Section):
    """Both hooks return the update as it is."""

    kind: ClassVar[str] = "identity"
    role: ClassVar[Role] = "neutral"
    payload: ClassVar[Payload] = "dense"

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Return `update`."""
        return update

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Return `update`."""
        return update
