"""Learning rates: linear warm-up, then a cosine down to a floor or a line down to zero."""

from dataclasses import dataclass

import optax

from examples.common.config import check_range


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then a cosine to a floor."""

    warmup: float = 0.1
    """Share of the steps that warm up."""
    floor: float = 0.1
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        check_range(self, "[0, 1]", "warmup", "floor")


def warmup_cosine(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, 0 to `steps` - 1.

    The first step already moves: with w warm-up steps, step t < w has (t + 1) / (w + 1) of the
    peak, and step w has all of it.
    """
    warmup = round(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps - 1, warmup + 1),
        end_value=peak * config.floor,
    )


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
