"""Learning rate: linear warm-up, then a line down to zero."""

import optax


def warmup_linear(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, 0 to `steps` - 1.

    The first of w warm-up steps already moves, with 1 / (w + 1) of the peak; step w has all of it;
    the step after the last one would have none.
    """
    first = round(warmup * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / (first + 1), peak, first),
            optax.linear_schedule(peak, 0.0, max(steps - first, 1)),
        ],
        [first],
    )
