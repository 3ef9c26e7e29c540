"""A learning rate found with fewer runs than the grid has."""

import math
from collections.abc import Mapping, Sequence


def next_rates(grid: Sequence[float], done: Mapping[float, float | None]) -> tuple[float, ...]:
    """Which rates of the grid a method needs next: every other one, then the best one's neighbours.

    Where the loss has one minimum over the grid, this ends at it. ``done`` has the loss of every
    rate that was run, None where it diverged. Nothing is next when the best rate and those beside
    it are known.
    """
    grid = sorted(set(grid))
    coarse = grid[1::2] or grid
    missing = tuple(rate for rate in coarse if rate not in done)
    if missing:
        return missing
    losses = [math.inf if done.get(rate) is None else done[rate] for rate in grid]
    best = min(range(len(grid)), key=losses.__getitem__)
    if math.isinf(losses[best]):  # All diverged: what is left may do better.
        return tuple(rate for rate in grid if rate not in done)
    return tuple(rate for rate in grid[max(best - 1, 0) : best + 2] if rate not in done)
