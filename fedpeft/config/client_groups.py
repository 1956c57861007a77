"""Clients that differ from the rest of their run: what is refused of them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError


def own_base_of(run: RunConfig) -> Callable[[str], int | None]:
    """Client to the number of its group, where that has a model of its own; None for all others."""

    def place(client: str) -> int | None:
        group = run.group_of(client)
        return group if group is not None and run.groups[group].own_model else None

    return place


def refuse_unknown(run: RunConfig, names: Collection[str]) -> None:
    """Compare the names in groups with those of the run's clients.

    Raises:
        RunFileError: some are not among them.
    """
    known = sorted(names)
    shown = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
    problems = [
        f"groups.{place}.clients: there is no client {client!r}; the run's {len(known)} clients are {shown}"
        for place, group in enumerate(run.groups)
        for client in group.clients
        if client not in names
    ]
    if problems:
        raise RunFileError("run file", problems)


def refuse_idle(run: RunConfig, names: Collection[str]) -> None:
    """Compare the modules that groups train with the parameters that there are.

    Raises:
        RunFileError: one of them names nothing that is trained.
    """
    problems = [
        f"groups.{place}.trains: {part!r} names no module with trained parameters; leave it out, or give the"
        " name of a module or of one around it, such as 'layers.3' or 'q_proj'"
        for place, group in enumerate(run.groups)
        for part in group.trains
        if not any(f".{part}." in f".{name}." for name in names)
    ]
    if problems:
        raise RunFileError("run file", problems)
