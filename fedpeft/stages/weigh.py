"""How much an update counts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from fedpeft.config.sections import Section
from fedpeft.errors import UpdateError
from fedpeft.stages.base import Role, StageContext
from fedpeft.updates.update import Update
from fedpeft.wire.payloads import Payload

MAX_EXAMPLES = 2**31


class Weigh(Section):
    """Set the weight: the client's number of training rows, or 1 for everyone.

    The trainer leaves the number of rows as the weight, so `examples` only checks it. Under `uniform` the
    server sets 1 again, whatever a client claims.
    """

    kind: ClassVar[str] = "weigh"
    role: ClassVar[Role] = "weigh"
    payload: ClassVar[Payload] = "dense"

    by: Literal["examples", "uniform"] = Field(
        "examples", description="Number of training rows, or 1 for every client."
    )

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Replace the weight under `uniform`."""
        return replace(update, weight=1) if self.by == "uniform" else update

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Check the claimed weight; under `uniform`, ignore it.

        Raises:
            UpdateError: a weight outside 1 to 2**31.
        """
        if self.by == "uniform":
            return replace(update, weight=1)
        if not 1 <= update.weight <= MAX_EXAMPLES:
            raise UpdateError(f"weight {update.weight} came, 1 to {MAX_EXAMPLES} rows are possible")
        return update
