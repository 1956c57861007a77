"""The stage that changes nothing: the onion's neutral element, for tests and for measuring overhead."""

from __future__ import annotations

from fedpeft.config import Section
from fedpeft.stages.base import StageContext
from fedpeft.update import Update


class Identity(Section):
    """Both hooks return the update as it is."""

    def on_client(self, update: Update, context: StageContext) -> Update:
        """Return `update`."""
        return update

    def on_server(self, update: Update, context: StageContext) -> Update:
        """Return `update`."""
        return update
