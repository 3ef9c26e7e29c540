"""How a model is fine-tuned: what is trained, and by which optimizer.

"adamw" trains everything. "lora" trains adapters beside the matrices of the layers with AdamW.
Every other method projects the gradients of the same matrices, and trains the norms in full.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.common import methods
from examples.common.methods import is_low_rank, method_transformation
from examples.common.optimizers import decayed
from examples.finetune.planner.adapters import (
    GraphDef,
    Params,
    abstract,
    add_adapters,
    merge_adapters,
)
from examples.llama.model.adapters import AdapterConfig
from examples.llama.model.config import ModelConfig

# Peak rates where none is given. That of AdamW is the one of Natural GaLore's experiments with
# TinyAgent; the others are five times that, as their updates have fewer dimensions. None is tuned.
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
class MethodConfig(methods.MethodConfig):
    """The method. "None" leaves an argument to the method's own default."""

    learning_rates = LEARNING_RATES

    rank: int = 32
    """Dimension of the gradient subspace, and of LoRA's adapters."""
    embeddings: Literal["frozen", "full"] = "frozen"
    """Low-rank: what becomes of the table of tokens and the output head, which LoRA freezes.
    Moments of the whole table would be larger than everything else together."""


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
