"""How a model is fine-tuned: what is trained, and by which optimizer.

"adamw" trains everything. "lora" trains adapters beside the matrices of the layers with AdamW.
Every other method projects the gradients of the same matrices, and trains the norms in full.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import optax
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.function_calling.adapters import (
    GraphDef,
    Params,
    abstract,
    add_adapters,
    merge_adapters,
)
from examples.function_calling.errors import ConfigError
from examples.llama.adapters import AdapterConfig
from examples.llama.config import ModelConfig
from examples.llama.finetuning import is_low_rank, method_transformation
from examples.llama.optimizers import decayed

# Peak rates where none is given. That of AdamW is the one of Natural GaLore's experiments with
# TinyAgent; next to it the updates of the others are as large as in examples/glue. None is tuned.
LEARNING_RATES = {
    "adamw": 7e-5,
    "lora": 3.5e-4,
    "galore": 3.5e-4,
    "fira": 3.5e-4,
    "natural-galore": 3.5e-4,
    "published-galore": 3.5e-4,
    "published-natural-galore": 3.5e-4,
    "paper-natural-galore": 3.5e-4,
}

if TYPE_CHECKING:
    MethodName = str
else:  # The names that the command line offers.
    MethodName = Literal[tuple(LEARNING_RATES)]


@dataclass(frozen=True)
class MethodConfig:
    """The method. "None" leaves an argument to the method's own default."""

    learning_rate: float | None = None
    """Peak learning rate; each method has its own default."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and tables."""
    clip_norm: float | None = None
    """Clip gradients to this global norm."""
    rank: int = 32
    """Dimension of the gradient subspace, and of LoRA's adapters."""
    update_interval: Annotated[int | None, tyro.conf.arg(name="interval")] = None
    """Low-rank: steps between two refreshes of the subspace."""
    scale: float | None = None
    """Low-rank: factor on the update of projected matrices; None is 16 / rank. LoRA: alpha / rank;
    None is 2."""
    side: Literal["auto", "short", "long", "left", "right", "both"] | None = None
    """Low-rank: which side of a matrix is projected."""
    moment_bits: Literal[8] | None = None
    """Galore and natural-galore: store Adam's moments in 8 bits."""
    embeddings: Literal["frozen", "full"] = "frozen"
    """Low-rank: what becomes of the table of tokens and the output head, which LoRA freezes.
    Moments of the whole table would be larger than everything else together."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")

    def check(self, model: ModelConfig) -> None:
        """Raises a ConfigError if the rank is that of a whole matrix."""
        if self.rank >= model.smallest_side:
            raise ConfigError(
                f"rank must be below the smallest side of the matrices, {model.smallest_side}; "
                f"got {self.rank}"
            )

    def peak(self, method: str) -> float:
        """Peak learning rate of a method."""
        return LEARNING_RATES[method] if self.learning_rate is None else self.learning_rate


class Tuning(NamedTuple):
    """A model that is ready to be trained."""

    graphdef: GraphDef  # of the model that all weights make
    trained: Params
    frozen: Params
    tx: optax.GradientTransformation  # for `trained`
    plain: Callable[[Params], Params]  # all weights to those of a model without adapters


def set_up(
    method: str,
    config: MethodConfig,
    model: ModelConfig,
    params: Params,
    learning_rate: optax.Schedule,
    seed: int,
) -> Tuning:
    """Puts a method around the parameters of a model.

    Raises:
      ConfigError: if the optimizer refuses an argument.
    """
    lora = method == "lora"
    scale = 2.0 if config.scale is None else config.scale
    adapter = AdapterConfig("lora" if lora else "none", config.rank, scale * config.rank)
    graphdef, like = abstract(model, adapter)
    if lora:
        params = add_adapters(params, like, seed)
    flat: dict[Any, Any] = flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if _is_trained(method, config, path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return Tuning(
        graphdef,
        unflatten_dict(trained),
        unflatten_dict(frozen),
        method_transformation(method, config, learning_rate, seed, mask=decayed),
        lambda weights: merge_adapters(weights, scale) if lora else weights,
    )


def _is_trained(method: str, config: MethodConfig, path: tuple[Any, ...]) -> bool:
    if method == "lora":
        return "lora" in path
    is_table = path[0] in ("embed", "head")
    return not (is_low_rank(method) and is_table and config.embeddings == "frozen")
