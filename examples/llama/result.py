"""Result of a run."""

from dataclasses import dataclass
from typing import Any

import optax

from examples.common.metrics import Record
from examples.common.train_state import TrainState
from examples.llama.data import Splits
from examples.llama.memory.peak import RunMemory
from examples.llama.run_config import RunConfig
from examples.llama.training.train_step import Apply


@dataclass(frozen=True)
class Result:
    """Result of a run, in arrays of this process."""

    config: RunConfig
    """With the vocabulary of the tokenizer."""
    splits: Splits
    apply: Apply
    """The model: `(weights, tokens (B, T)) -> logits (B, T, V)`."""
    tx: optax.GradientTransformation
    state: TrainState
    records: list[Record]
    """Metrics of every logged step and every evaluation; see `metrics.of_kind`."""
    steps: int
    """Optimizer steps done: fewer than `config.steps` if the run was stopped or diverged."""
    diverged_at: int | None
    """The step whose loss, gradient or weights are not finite, if one ended the run."""
    memory: RunMemory
    """Memory of a step, and the measured peak."""
    interrupted: bool = False
    """Whether the run was stopped in an evaluation, which a resumed run makes up for."""

    @property
    def params(self) -> Any:
        """The parameters that were trained: what `tx` is for."""
        return self.state.float_params

    @property
    def weights(self) -> Any:
        """All parameters, the frozen ones of LoRA included: what `apply` takes."""
        return self.state.weights

    @property
    def diverged(self) -> bool:
        return self.diverged_at is not None

    @property
    def finished(self) -> bool:
        return self.steps == self.config.steps and not (self.diverged or self.interrupted)
