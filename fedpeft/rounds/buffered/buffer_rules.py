"""Numbers of a run file that mode 'buffered' can't work with."""

from __future__ import annotations

from fedpeft.aggregation.staleness import weight_problems
from fedpeft.config.sections import RunConfig
from fedpeft.rounds.buffered.in_flight import buffer_of, concurrency_problems


def buffer_problems(run: RunConfig, clients: int | None) -> list[str]:
    """One line per problem; none for synchronous runs.

    Args:
        clients: of the run; None where they are not known yet.
    """
    if run.federation.mode != "buffered":
        return []
    section = buffer_of(run)
    return [
        *weight_problems(section),
        *(concurrency_problems(section, clients) if clients is not None else ()),
        *_ledger_problems(run, section.max_staleness),
    ]


def _ledger_problems(run: RunConfig, max_staleness: int) -> list[str]:
    kept = run.output.keep_checkpoints
    if kept is None or kept > max_staleness:
        return []
    return [
        f"output.keep_checkpoints: {kept} came, and work on the last {max_staleness + 1} states may be under"
        f" way when a run is resumed; keep at least {max_staleness + 1}, or lower"
        " federation.buffer.max_staleness"
    ]
