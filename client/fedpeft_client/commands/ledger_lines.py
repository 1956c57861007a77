"""The ledger of what left a device, as lines for its owner."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedpeft_client.transport.egress import BEFORE, EgressSums

_SHOWN = ("run", "round", "kind", "failure", "refusal", "values", "metrics", "weight")


def ledger_lines(entries: Iterable[Mapping[str, Any]], last: int) -> Iterator[str]:
    """Sums by kind of message and by name, then the last messages one by one."""
    sums = EgressSums()
    tail: deque[Mapping[str, Any]] = deque(maxlen=last)
    for entry in entries:
        sums.add(entry)
        if entry.get("what") != BEFORE:
            tail.append(entry)
    messages, bytes_ = sums.messages, sums.bytes
    yield f"{sum(messages.values())} messages of {sum(bytes_.values())} bytes left this device"
    for what, count in sorted(messages.items()):
        yield f"  {what:<10} {count:>8} messages {bytes_[what]:>14} bytes"
    for name, count in sorted(sums.names.items()):
        yield f"  {name:<32} {count:>8} times"
    for entry in tail:
        shown = {key: entry[key] for key in _SHOWN if entry.get(key) not in (None, {}, "")}
        # As JSON: names of runs come from a server and may hold anything.
        head = f"{entry.get('time', '')}  {entry.get('what', '')}  {entry.get('bytes', 0)} bytes"
        yield f"{head}  {json.dumps(shown)}" if shown else head
