"""How wide the range of usable learning rates is."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

TOLERANCE = 0.1  # nats per token above the method's own best


class Range(NamedTuple):
    """Learning rates whose final loss is near the method's best."""

    low: float
    high: float
    low_is_edge: bool  # the grid ends there, the range may not
    high_is_edge: bool

    @property
    def decades(self) -> float:
        return math.log10(self.high / self.low)


def usable_range(curve: Mapping[float, float | None], tolerance: float = TOLERANCE) -> Range | None:
    """The range around the best rate in which the loss is at most ``tolerance`` above the best.

    Between two rates the loss is linear in the logarithm of the rate. Towards a rate that diverged
    the range ends at the last one that did not. None if all diverged.
    """
    usable = {rate: loss for rate, loss in curve.items() if loss is not None}
    if not usable:
        return None
    best = min(usable, key=lambda rate: usable[rate])
    limit = usable[best] + tolerance
    rates = sorted(curve)
    down, up = rates[: rates.index(best) + 1][::-1], rates[rates.index(best) :]
    (low, low_is_edge), (high, high_is_edge) = _walk(curve, down, limit), _walk(curve, up, limit)
    return Range(low, high, low_is_edge, high_is_edge)


def _walk(
    curve: Mapping[float, float | None], rates: list[float], limit: float
) -> tuple[float, bool]:
    """Where the curve, followed along ``rates``, passes ``limit``; or the end of the grid."""
    for here, there in itertools.pairwise(rates):
        loss, beyond = curve[here], curve[there]
        if loss is None or beyond is None:
            return here, False
        if beyond > limit:
            share = (limit - loss) / (beyond - loss)
            return here * (there / here) ** share, False
    return rates[-1], True
