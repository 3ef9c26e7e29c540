"""Methods of fine-tuning: what is trained, and by which optimizer.

"adamw" trains everything. "lora" trains adapters beside the matrices of the layers with AdamW.
Every other method projects the gradients of the same matrices, and trains the norms in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import optax
from flax import nnx

from examples.common import methods
from examples.common.lora import add_adapters, is_adapter, merge_adapters, partition
from examples.common.methods import Tuning, is_low_rank, method_transformation
from examples.common.optimizers import decayed
from examples.common.train_state import Params
from examples.llama.model.adapters import AdapterConfig, make_linear
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import abstract_model

GraphDef = Any

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


def check_methods(names: Sequence[str], config: MethodConfig, model: ModelConfig) -> None:
    """Raise a ConfigError for what `set_up` refuses, without the parameters of the model."""
    config.check_rank(names, model.smallest_side)
    for name in names:
        method_transformation(name, config, optax.constant_schedule(0.0), 0, mask=decayed)


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
    adapter = AdapterConfig("lora", config.rank, scale * config.rank) if lora else AdapterConfig()
    made = abstract_model(model, make_linear(adapter))
    if lora:
        like = nnx.to_pure_dict(nnx.state(made, nnx.Param))
        params = add_adapters(params, like, seed)
    trained, frozen = partition(params, lambda path: _is_trained(method, config, path))
    return Tuning(
        nnx.graphdef(made),
        trained,
        frozen,
        method_transformation(method, config, learning_rate, seed, mask=decayed),
        lambda weights: merge_adapters(weights, scale) if lora else weights,
    )


def _is_trained(method: str, config: MethodConfig, path: tuple[Any, ...]) -> bool:
    if method == "lora":
        return is_adapter(path)
    is_table = path[0] in ("embed", "head")
    return not (is_low_rank(method) and is_table and config.embeddings == "frozen")
