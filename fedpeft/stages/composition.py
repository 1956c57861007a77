"""Which stage may follow which: a table, and the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpeft.stages.base import Role

REFUSED: Mapping[tuple[Role, Role], str] = {  # (earlier, later) on the client, and why not
    ("lossy", "lossy"): "only one stage may change the representation; keep one of the two",
    ("lossy", "bound"): "a compressed update can't be scaled to a norm; clip before it is compressed",
    (
        "lossy",
        "noise",
    ): "what compression keeps depends on the data; add the noise first, compressing it is free",
    ("noise", "bound"): "the noise is made for the clipped norm; clip first",
    ("noise", "noise"): "one draw of noise is accounted for; keep one of the two",
    (
        "lossy",
        "mask",
    ): "compressed forms don't add up under masks; aggregate without masks, or without compression",
    ("mask", "bound"): "masked integers are uniform and have no norm; clip before the mask",
    ("mask", "noise"): "noise must be under the mask; add it first",
    ("mask", "lossy"): "masked integers can't lose a bit; aggregate without masks, or without compression",
    ("mask", "mask"): "one mask is enough; keep one of the two",
}
"""What is missing may be combined.

Source: the order of clipping, noise and compression is that of post-processing: what comes after noise costs
no privacy, what comes before it must be bounded or public. The server's noise under client-level privacy has
no place in the list: it is added behind all server hooks and behind the server's own clipping of what they
decoded, so that whatever a client did to its update is bounded.
"""


def composition_problems(stages: Sequence[tuple[str, Role]], *, noise_first: bool = False) -> list[str]:
    """One line per pair of stages that makes no sense in this order.

    Args:
        stages: (kind, role) in the client's order.
        noise_first: `[privacy]` adds its noise before all of them.
    """
    problems = []
    for place, (kind, role) in enumerate(stages):
        reason = REFUSED.get(("noise", role)) if noise_first else None
        if reason is not None:
            problems.append(f"stages.{place} ({kind}) can't follow the noise of [privacy]: {reason}")
    for place, (kind, role) in enumerate(stages):
        for before, (other, other_role) in enumerate(stages[:place]):
            reason = REFUSED.get((other_role, role))
            if reason is not None:
                problems.append(f"stages.{place} ({kind}) can't follow stages.{before} ({other}): {reason}")
    return problems
