"""Methods of fine-tuning by name.

"lora" is AdamW on adapters; every other method is an optimizer.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import optax
import tyro

from examples.common.config import INT32, check_range
from examples.common.errors import ConfigError
from examples.common.optimizers import OPTIMIZERS, OptimizerConfig, make_transformation
from examples.common.train_state import Params


@dataclass(frozen=True)
class MethodConfig:
    """The method. "None" leaves an argument to the method's own default."""

    learning_rates: ClassVar[Mapping[str, float]]  # The peak of each method where none is given.

    learning_rate: float | None = None
    """Peak learning rate; each method has its own default."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and tables."""
    clip_norm: float | None = None
    """Clip gradients to this global norm."""
    rank: int = 8
    """Dimension of the gradient subspace, and of LoRA's adapters."""
    update_interval: Annotated[int | None, tyro.conf.arg(name="interval")] = None
    """Low-rank: steps between two refreshes of the subspace."""
    scale: float | None = None
    """Low-rank: factor on the update of projected matrices; None is 16 / rank, which gives the 4 at
    rank 4 and the 2 at rank 8 of the GaLore paper. LoRA: alpha / rank; None is 2."""
    side: Literal["short", "long", "left", "right", "both"] | None = None
    """Low-rank: which side of a matrix is projected."""
    moment_bits: Literal[8] | None = None
    """Galore, fira and natural-galore: store Adam's moments in 8 bits; None is the weights'
    dtype."""

    def __post_init__(self) -> None:
        check_range(self, f"[1, {INT32})", "rank", "update_interval")
        check_range(self, "(0, inf)", "learning_rate", "clip_norm")
        check_range(self, "[0, inf)", "weight_decay", "scale")

    def check_rank(self, names: Sequence[str], smallest_side: int) -> None:
        """Raises a ConfigError if the rank is that of a whole matrix, for methods that have one."""
        has_rank = any(name == "lora" or is_low_rank(name) for name in names)
        if has_rank and self.rank >= smallest_side:
            raise ConfigError(
                f"rank must be below the smallest side of the matrices, {smallest_side}; "
                f"got {self.rank}"
            )

    def peak(self, method: str) -> float:
        """Peak learning rate of a method."""
        given = self.learning_rate
        return self.learning_rates[method] if given is None else given


class Tuning(NamedTuple):
    """A model that is ready to be trained."""

    model: Any  # what the step of a program computes with
    trained: Params
    frozen: Params
    tx: optax.GradientTransformation  # for `trained`
    plain: Callable[[Params], Params]  # all weights to those of a model without adapters


def is_low_rank(method: str) -> bool:
    """Whether it projects gradients."""
    return method != "lora" and "where" in inspect.signature(OPTIMIZERS[method].factory).parameters


def method_transformation(
    method: str, config: MethodConfig, learning_rate: optax.Schedule, seed: int, **arguments: Any
) -> optax.GradientTransformation:
    """The optimizer of a method; `arguments` go to `make_transformation`.

    Raises:
      ConfigError: if the optimizer refuses an argument.
    """
    # One parametrisation for all methods, that of the GaLore papers: α η for projected matrices, η
    # for all others, a residual at the root mean square of AdamW's updates.
    is_ours = method == "natural-galore"
    low_rank: dict[str, Any] = {
        "residual_scale": 0.2 if is_ours else None,
        "update_interval": config.update_interval,
        "moment_bits": config.moment_bits,
        "scale": 16 / config.rank if config.scale is None else config.scale,
        "side": config.side,
    }
    # A run compares several methods, and each takes the options that it has.
    name = "adamw" if method == "lora" else method
    known = inspect.signature(OPTIMIZERS[name].factory).parameters
    optimizer = OptimizerConfig(
        name=name,
        unprojected_ratio=1.0 if is_ours else None,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        rank=config.rank,
        **{k: v for k, v in low_rank.items() if k in known},
    )
    try:
        return make_transformation(optimizer, learning_rate, seed=seed, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{method}: {error}") from error
