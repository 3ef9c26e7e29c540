"""Methods of fine-tuning: the trained parameters, and their optimizer.

"adamw" trains everything. "lora" trains adapters and the head with AdamW. Every other method
projects the gradients of the same matrices that LoRA adapts, of the head's own matrix and of the
tables of tokens and positions; it trains norms, biases and the classifier in full.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.common import methods
from examples.common.errors import ConfigError
from examples.common.lora import LoRALinear, add_adapters, is_adapter, merge_adapters, partition
from examples.common.methods import Tuning, is_low_rank, method_transformation
from examples.finetune.encoder.config import EncoderConfig
from examples.finetune.encoder.model import MakeLinear, dense, make_model
from examples.finetune.encoder.weights import MATRICES, Params, module_name

# Peak rates where none is given, for the batches and epochs of `make finetune`. The first four were
# tuned by `benchmarks.finetuning.encoder` at rank 8, LoRA's is half of its best one, which is near
# rates at which it learns nothing; each of the others is that of the one among them whose updates
# are about as large.
LEARNING_RATES = {
    "adamw": 5e-5,
    "lora": 1e-3,
    "galore": 5e-4,
    "natural-galore": 2e-4,
    "fira": 2e-4,
    "published-galore": 5e-4,
    "published-natural-galore": 5e-4,
    "paper-natural-galore": 5e-4,
}

if TYPE_CHECKING:
    MethodName = str
else:  # The names that the command line offers.
    MethodName = Literal[tuple(LEARNING_RATES)]

HEAD = "head.dense"
TABLES = ("word", "position", "token_type")


@dataclass(frozen=True)
class MethodConfig(methods.MethodConfig):
    """The method. "None" leaves an argument to the method's own default."""

    learning_rates = LEARNING_RATES

    moment_bits: Literal[8] | None = 8
    """Galore, fira and natural-galore: store Adam's moments in 8 bits; None is the weights'
    dtype."""
    targets: tuple[str, ...] = ("query", "key", "value", "intermediate.dense", "output.dense")
    """Matrices that are projected or adapted, by the end of their names in PyTorch."""
    project_head: bool = True
    """Low-rank: project the head's own matrix too, which LoRA trains in full."""
    embeddings: Literal["frozen", "projected", "full"] = "projected"
    """Low-rank: what becomes of the tables of tokens and positions, which LoRA freezes. Moments of
    the whole tables, "full", would be larger than everything else together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ConfigError("targets must name at least one matrix")


def set_up(
    method: str,
    config: MethodConfig,
    encoder: EncoderConfig,
    params: Params,
    learning_rate: optax.Schedule,
    seed: int,
) -> Tuning:
    """Puts a method around the parameters of a model.

    Raises:
      ConfigError: if a target names no matrix, or the rank is that of a whole matrix.
    """
    config.check_rank([method], min(encoder.hidden, encoder.intermediate))
    modules = chosen_modules(config.targets, encoder)
    apply, plain = make_model(encoder)[0], lambda weights: weights
    if method == "lora":
        scale = 2.0 if config.scale is None else config.scale
        apply, like = make_model(encoder, lora_on(modules, config.rank, scale))
        params = add_adapters(params, like, seed)

        def plain(weights):
            return merge_adapters(weights, scale)

    trained, frozen = partition(params, lambda path: _is_trained(method, config, path))
    tx = _transformation(method, config, modules, learning_rate, seed)
    return Tuning(apply, trained, frozen, tx, plain)


def check_methods(names: Sequence[str], config: MethodConfig, encoder: EncoderConfig) -> None:
    """Raise a ConfigError for what `set_up` refuses, without the parameters of the model."""
    config.check_rank(names, min(encoder.hidden, encoder.intermediate))
    modules = chosen_modules(config.targets, encoder)
    for name in names:
        _transformation(name, config, modules, optax.constant_schedule(0.0), seed=0)


def chosen_modules(targets: tuple[str, ...], encoder: EncoderConfig) -> frozenset[str]:
    """The matrices of the layers that the targets name."""
    names = {module: module_name(module, encoder.architecture) for module in MATRICES}
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names.values()):
            raise ConfigError(
                f"targets: no matrix is called {target!r}; there are {', '.join(names.values())}"
            )
    return frozenset(
        module
        for module, name in names.items()
        if any(name.endswith(f".{target}") for target in targets)
    )


def lora_on(modules: Collection[str], rank: int, scale: float) -> MakeLinear:
    """Linear maps with adapters beside these modules (``layers.attention.query``)."""

    def make(
        name: str, inputs: int, outputs: int, config: EncoderConfig, rngs: nnx.Rngs
    ) -> nnx.Module:
        base = dense(inputs, outputs, config, rngs)
        adapted = f"layers.{name}" in modules
        return LoRALinear(base, rank, scale, rngs) if adapted else base

    return make


def _is_trained(method: str, config: MethodConfig, path: tuple[str, ...]) -> bool:
    if method == "lora":
        return is_adapter(path) or path[0] == "head"
    is_table = path[0] == "embeddings" and path[1] in TABLES
    return not (is_low_rank(method) and is_table and config.embeddings == "frozen")


def _transformation(
    method: str,
    config: MethodConfig,
    modules: frozenset[str],
    learning_rate: optax.Schedule,
    seed: int,
) -> optax.GradientTransformation:
    projected = set(modules) | ({HEAD} if config.project_head else set())

    def where(path: Any, _leaf: Any) -> bool:
        *module, leaf = str(path).split("/")
        if leaf == "embedding":
            return config.embeddings == "projected" and module[-1] != "token_type"
        return leaf == "kernel" and ".".join(module) in projected

    return method_transformation(method, config, learning_rate, seed, mask=_decayed, where=where)


def _decayed(params: Params) -> Params:
    flat = flatten_dict(params)
    vectors = ("bias", "scale")
    return unflatten_dict({path: path[-1] not in vectors for path in flat})
