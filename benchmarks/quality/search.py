"""A learning rate found with fewer runs than the grid has."""

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
    usable = {loss: rate for rate in grid if (loss := done.get(rate)) is not None}
    if not usable:  # All diverged: what is left may do better.
        return tuple(rate for rate in grid if rate not in done)
    best = grid.index(usable[min(usable)])
    return tuple(rate for rate in grid[max(best - 1, 0) : best + 2] if rate not in done)
