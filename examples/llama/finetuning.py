"""Methods of fine-tuning by name, as `examples/glue` and `examples/function_calling` have them.

"lora" is AdamW on adapters; every other method is an optimizer.
"""

import inspect
from typing import Any, Literal, Protocol

import optax

from examples.llama.errors import ConfigError
from examples.llama.optimizers import OPTIMIZERS, OptimizerConfig, make_transformation


class MethodOptions(Protocol):
    """What the configurations of methods have in common."""

    @property
    def weight_decay(self) -> float: ...
    @property
    def clip_norm(self) -> float | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def update_interval(self) -> int | None: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def side(self) -> Literal["auto", "short", "long", "left", "right", "both"] | None: ...
    @property
    def moment_bits(self) -> Literal[8] | None: ...


def is_low_rank(method: str) -> bool:
    """Whether it projects gradients."""
    return method != "lora" and "where" in inspect.signature(OPTIMIZERS[method].factory).parameters


def method_transformation(
    method: str, config: MethodOptions, learning_rate: optax.Schedule, seed: int, **arguments: Any
) -> optax.GradientTransformation:
    """The optimizer of a method; `arguments` go to `make_transformation`.

    Raises:
      ConfigError: if the optimizer refuses an argument.
    """
    optimizer = OptimizerConfig(
        name="adamw" if method == "lora" else method,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        rank=config.rank,
        update_interval=config.update_interval,
        moment_bits=config.moment_bits,
        scale=16 / config.rank if config.scale is None else config.scale,
        side=config.side,
    )
    try:
        return make_transformation(optimizer, learning_rate, seed=seed, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{method}: {error}") from error
