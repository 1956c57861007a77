"""What one more round of a private run costs, computed in the worker: an accountant's libraries weigh 130 MB.

Every unit that is protected has its own sum: all events of one kind, over all runs on these rows, are
composed together in the accountant. Deltas add up where epsilons do, so each of several kinds gets its share
of the owner's delta.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fedpeft.config.device_task import read_device_task
from fedpeft.errors import FedPEFTError, PrivacyError
from fedpeft.runtime.frames import Frame
from fedpeft.wire.failures import to_record

ACCOUNT = "account"  # kind of order


def order_costs(
    described: str,
    client: str,
    charged: int,
    others: Iterable[tuple[Mapping[str, Any], int]],
    delta: float,
    *,
    round_: int = 0,
) -> Frame:
    """Return the order to a worker that `costs_of_round` carries out.

    Args:
        described: text of what the device is told of the run.
        charged: events of the run that are paid for.
        others: events of all other runs, with how many of each are paid for.
        delta: the owner's.
        round_: that is to be paid for; 0: the run's next, whichever it is.
    """
    spent = [[dict(event), count] for event, count in others]
    header = {
        "kind": ACCOUNT,
        "device_task": described,
        "client": client,
        "charged": charged,
        "others": spent,
    }
    return Frame({**header, "delta": delta, "round": round_}, {})


def costs_of_round(order: Frame) -> Frame:
    """Return what one more round costs, as `privacy_ledger.Costs` has it, or why its promise is none."""
    header = order.header
    try:
        return Frame({"error": None, **_costs(header)})
    except FedPEFTError as error:
        return Frame({"error": to_record(error)})


def _costs(header: Mapping[str, Any]) -> dict[str, Any]:
    from fedpeft.privacy.accountant import epsilon
    from fedpeft.privacy.budget_forecast import affordable_rounds
    from fedpeft.privacy.events import event_from_plain, event_to_plain
    from fedpeft.privacy.kinds import KINDS, budget_of, event_of
    from fedpeft.privacy.run_checks import privacy_problems

    run = read_device_task(header["device_task"]).as_run.of_client(header["client"])
    problems = privacy_problems(run)
    if problems or run.privacy is None:
        raise PrivacyError("; ".join(problems) or "the run has no [privacy] section")
    event, budget = event_of(run), budget_of(run)
    charged, delta = int(header["charged"]), float(header["delta"])
    count = 1
    if KINDS[run.privacy.kind].joint:  # rounds without this client cost it as well: see `ClientLevel`
        affordable = max(1, min(run.run.rounds, affordable_rounds(event, budget)))
        count = max(0, max(affordable, int(header["round"])) - charged)  # a later round is over the budget
    events: dict[str, list[Any]] = defaultdict(list)
    events[event.kind] += [event] * (charged + count)
    own = list(events[event.kind])
    for plain, times in header["others"]:
        other = event_from_plain(plain)
        events[other.kind] += [other] * int(times)
    share = delta / len(events)
    return {
        "event": event_to_plain(event),
        "count": count,
        "epsilon": epsilon(own, delta),
        "promised_epsilon": epsilon(own, budget.target_delta),
        "total_epsilon": sum(epsilon(each, share) for each in events.values()),
    }
