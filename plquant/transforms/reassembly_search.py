"""How many channels to split at a site: the candidate that is best on the quantized stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from plquant.transforms.reassembly_plan import ReassemblyPlan

SHARES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)


def extra_candidates(channels: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Numbers of extra channels worth trying besides none, ascending: shares of all channels, rounded up."""
    return sorted({math.ceil(share * channels) for share in shares})


def search_extra(
    channels: int,
    make_plan: Callable[[int], ReassemblyPlan],
    error: Callable[[ReassemblyPlan], float],
    shares: Sequence[float] = SHARES,
) -> ReassemblyPlan:
    """The plan of least error; the very object that was evaluated.

    Doing nothing is a candidate like the others (the released code never evaluates it), and of equal ones that with
    fewer extra channels is taken; so the result is never worse than no reassembly on what ``error`` looks at.

    Args:
        channels: K.
        make_plan: Number of extra channels -> plan.
        error: Plan -> error of the site with it, as it will be deployed.
        shares: Extra channels to try, as shares of ``channels``.
    """
    best = ReassemblyPlan.identity(channels)
    least = error(best)
    for extra in extra_candidates(channels, shares):
        plan = make_plan(extra)
        found = error(plan)
        if found < least:
            best, least = plan, found
    return best
