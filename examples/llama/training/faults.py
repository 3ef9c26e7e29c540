"""Gradients that are not finite, and losses that jump: what is done, and how often it was."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from examples.common.config import INT32, check_range
from examples.common.errors import ConfigError
from examples.common.metrics import Record

_WINDOW = 50  # Losses that a new one is compared with,
_FEWEST = 10  # if there are so many; the first steps have the highest losses of all.


@dataclass(frozen=True)
class FaultConfig:
    """Faults that a run survives. All of this may change when a run is resumed."""

    skip_nonfinite: bool = False
    """Drop a batch whose loss or gradient is not finite: weights and optimizer stay as they are,
    and the next batch takes its place."""
    max_skips: int = 10
    """Batches dropped in a row after which the run has diverged."""
    rollback_on_spike: float | None = None
    """Go back to the last checkpoint, and on with other data, when the loss of a step is not finite
    or above this factor times the median of the 50 steps before it."""
    max_rollbacks: int = 3
    """Rollbacks after which the next spike is an error."""

    def __post_init__(self) -> None:
        check_range(self, "(1, inf]", "rollback_on_spike")
        check_range(self, f"[1, {INT32})", "max_skips", "max_rollbacks")


class Guard:
    """Count faults and detect spikes of the loss. Saved with each checkpoint."""

    def __init__(self, config: FaultConfig):
        self.config = config
        self.skipped = 0
        self.rollbacks = 0
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def skips(self, skipped: bool) -> None:
        """Records a batch."""
        self.skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0

    @property
    def gives_up(self) -> bool:
        """Whether too many batches in a row were dropped."""
        return self._in_a_row >= self.config.max_skips

    def is_spike(self, loss: float) -> bool:
        """Whether the loss of a step is one; if not, later ones are compared with it."""
        factor = self.config.rollback_on_spike
        if factor is None:
            return False
        enough = len(self._losses) >= _FEWEST
        if not math.isfinite(loss) or (enough and loss > factor * statistics.median(self._losses)):
            return True
        self._losses.append(loss)
        return False

    def rolls_back(self, step: int, loss: float) -> None:
        """Records a rollback.

        Raises:
          ConfigError: if there were too many.
        """
        if self.rollbacks == self.config.max_rollbacks:
            raise ConfigError(
                f"the loss jumped to {loss:.4g} at step {step} after {self.rollbacks} rollback(s): "
                "try a lower --learning-rate"
            )
        self.rollbacks += 1

    def knows(self, record: Record) -> bool:
        """Whether a record is of a rollback or a dropped batch that has been counted."""
        count = {"skipped": "skipped", "rollback": "rollbacks"}.get(record["kind"])
        return count is not None and record[count] <= getattr(self, count)

    def to_json(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "rollbacks": self.rollbacks,
            "losses": list(self._losses),
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """As it was when `saved` was made by `to_json`; None: before there was one."""
        if saved is not None:
            self.skipped, self.rollbacks = saved["skipped"], saved["rollbacks"]
            self._in_a_row = saved["in_a_row"]
        self.compare_with(saved)

    def compare_with(self, saved: dict[str, Any] | None) -> None:
        """Compares the next losses with those that were known when `saved` was made."""
        self._losses = deque([] if saved is None else saved["losses"], _WINDOW)
