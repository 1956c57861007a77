"""What can't go with what: one table of conflicts between what the entries of a run declare, and its check.

Entries say what they are (`fedpeft.config.traits`); the rows of `fedpeft.compatibility.table` name two such
traits,
the reason and the advice. No row asks for a name, so an entry of a plugin is refused where one of ours with
the same traits is. Checks of one section's own values stay with that section.
"""

from fedpeft.compatibility.check import conflicts_of
from fedpeft.compatibility.conflict import Conflict
from fedpeft.compatibility.entries import Entry, entries_of
from fedpeft.compatibility.table import CONFLICTS

__all__ = ["CONFLICTS", "Conflict", "Entry", "conflicts_of", "entries_of"]
