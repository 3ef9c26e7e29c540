"""Names to optimizers. Adding one is one line in `OPTIMIZERS`."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import optax
import tyro

import natgalore_jax as ng
from examples.common.composed import composed_adamw, with_arguments_of
from examples.common.config import check_range
from examples.common.schedule import ScheduleConfig, warmup_cosine

NANO_WIDTH = 128
_TRAINED_UNPROJECTED = 3e-5  # rate of embeddings, head and norms on trained weights
_TRAINED_LORA = 1e-3  # of LoRA's A and B on trained weights, with AdamW
# Options that are not arguments of the factories, or that have a value without being given.
_OF_ANY_OPTIMIZER = {"name", "learning_rate", "clip_norm", "unprojected_ratio", "rank"}


class Entry(NamedTuple):
    """An optimizer that has a name: `factory(learning_rate, **arguments, **fixed)`."""

    factory: Callable[..., optax.GradientTransformation]
    learning_rate: float  # Peak, where --learning-rate is not given; chosen at the nano size.
    fixed: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    # Of the two rates, likewise, of random weights; None: the learning rate is not that of the
    # hidden matrices.
    unprojected_ratio: float | None = None
    trained_learning_rate: float | None = None  # Peak on trained weights, where it was measured.


def _adafactor(learning_rate, weight_decay: float = 0.0, mask=None):
    adafactor = optax.adafactor(learning_rate, multiply_by_parameter_scale=False, momentum=0.9)
    if not weight_decay:
        return adafactor

    # Its own decay is a share of the weights in every step, whatever the learning rate is.
    def decay(count):
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return -weight_decay * rate

    return optax.chain(adafactor, optax.add_decayed_weights(decay, mask))


@with_arguments_of(ng.low_rank_project)
def _galore_adafactor(learning_rate, scale: float = 0.25, **settings: Any):
    return ng.chain(
        ng.low_rank_project(**settings), _adafactor(learning_rate), ng.project_back(scale)
    )


def _adamw_8bit(
    learning_rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask=None,
):
    return optax.chain(
        ng.scale_by_adam_8bit(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@with_arguments_of(ng.low_rank_project, ng.woodbury_natural_gradient, ng.project_back)
def _stored_gradients(
    learning_rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask=None,
    scale: float = 0.25,
    **settings: Any,
):
    """Natural GaLore as published, the Fisher matrix made of stored gradients."""
    adam = optax.scale_by_adam(b1, b2, eps)
    return composed_adamw(
        "stored", learning_rate, adam, weight_decay, mask, scale=scale, **settings
    )


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(optax.adamw, 2.5e-3, unprojected_ratio=4.0, trained_learning_rate=1e-4),
    "adamw-8bit": Entry(_adamw_8bit, 2.5e-3, unprojected_ratio=4.0, trained_learning_rate=1e-4),
    "adafactor": Entry(_adafactor, 3e-3),
    "galore": Entry(ng.galore_adamw, 2e-2, trained_learning_rate=1.2e-3),
    "galore-adafactor": Entry(_galore_adafactor, 1e-2),
    "fira": Entry(ng.galore_adamw, 1e-2, {"residual": "fira"}, trained_learning_rate=1.2e-3),
    "natural-galore": Entry(
        ng.natural_galore_adamw, 5e-3, unprojected_ratio=4.0, trained_learning_rate=3e-4
    ),
    "lean-natural-galore": Entry(
        ng.lean_natural_galore_adamw, 5e-3, unprojected_ratio=4.0, trained_learning_rate=3e-4
    ),
    "stored-gradients": Entry(_stored_gradients, 1e-2),
    "apollo": Entry(ng.contrib.apollo_adamw, 1e-2),
    "apollo-mini": Entry(ng.contrib.apollo_mini_adamw, 1e-2),
    "ldadam": Entry(ng.contrib.ldadamw, 3e-3),
    "alice": Entry(ng.contrib.alice_adamw, 2e-2),
    "racs": Entry(ng.contrib.racs_adamw, 2e-2),
    "scale": Entry(ng.contrib.scale_sgd, 1e-3),
    "published-galore": Entry(ng.published_galore_adamw, 1e-2),
    "published-natural-galore": Entry(ng.published_natural_galore_adamw, 1e-2),
    "paper-natural-galore": Entry(ng.paper_natural_galore_adamw, 1e-2),
}

if TYPE_CHECKING:
    OptimizerName = str
else:  # The names that the command line offers.
    OptimizerName = Literal[tuple(OPTIMIZERS)]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. "None" leaves an argument to the optimizer's own default. An option
    that the optimizer does not have is an error; only --rank is ignored by optimizers without
    a subspace."""

    name: Annotated[OptimizerName, tyro.conf.arg(name="optimizer")] = "natural-galore"
    """The optimizer that trains the model."""
    learning_rate: float | None = None
    """Peak learning rate; each optimizer has its own default. Those of adamw, adamw-8bit and both
    forms of natural-galore halve where the width of the model doubles. Where published weights
    are trained further, it is 1e-4 for adamw and adamw-8bit, 3e-4 for both forms of natural-galore,
    1.2e-3 for galore and fira (docs/pretrained.md), and for others a hundredth."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices; norm scales are never decayed."""
    clip_norm: float | None = None
    """Clip gradients to this global norm."""
    b1: float | None = None
    """Decay of the first moment."""
    b2: float | None = None
    """Decay of the second moment."""
    eps: float | None = None
    """Added to the root of the second moment."""
    rank: int = 64
    """Low-rank: dimension of the gradient subspace."""
    update_interval: Annotated[int | None, tyro.conf.arg(name="interval")] = None
    """Low-rank: steps between two refreshes of the subspace."""
    moment_bits: Literal[8] | None = None
    """Galore, fira and natural-galore: store Adam's moments in 8 bits instead of the
    weights' dtype."""
    unprojected_ratio: float | None = None
    """Learning rate of embeddings, head and norms over that of the hidden matrices; by default 4
    for both forms of natural-galore and, on random weights, for adamw and adamw-8bit, more where
    their own learning rate falls with the width; else 1. Galore and its relatives have it in their
    scale."""
    scale: float | None = None
    """Low-rank: factor on the update of projected matrices."""
    side: Literal["short", "long", "left", "right", "both"] | None = None
    """Low-rank: which side of a matrix is projected."""
    method: Literal["power", "svd", "eigh", "randomized", "gaussian", "online"] | None = None
    """Galore, galore-adafactor, fira and stored-gradients: how the subspace is computed."""
    basis_dtype: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Low-rank: number format of the stored bases; that of the weights by default."""
    transition: Literal["rotate", "reset", "keep"] | None = None
    """Stored-gradients and galore-adafactor: what happens to moments and history when the subspace
    changes."""
    stagger: bool | None = None
    """Galore, galore-adafactor, fira and stored-gradients: refreshes spread over the interval."""
    residual: Literal["none", "fira", "fisher"] | None = None
    """Low-rank: what becomes of the gradient outside the subspace: nothing, scaled as the inner
    optimizer scales the inside (Fira), or by its own Fisher matrix."""
    residual_scale: float | None = None
    """Natural-galore and stored-gradients: factor on the update outside the subspace."""
    history: int | None = None
    """Stored-gradients, published- and paper-natural-galore: how many gradients the Fisher matrix
    is built from."""
    damping: float | None = None
    """Stored-gradients, published- and paper-natural-galore: what is added to the Fisher matrix."""
    damping_mode: Literal["absolute", "relative"] | None = None
    """Stored-gradients: damping as it is, or times the mean squared norm of the history."""
    history_dtype: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Stored-gradients: number format of the stored gradients."""

    def __post_init__(self) -> None:
        named = ("learning_rate", "weight_decay", "eps", "unprojected_ratio", "scale")
        check_range(self, "[0, inf)", *named, "residual_scale", "damping")
        check_range(self, "(0, inf)", "clip_norm")
        check_range(self, "[0, 1)", "b1", "b2")


def with_unprojected_ratio(
    tx: optax.GradientTransformation, ratio: float
) -> optax.GradientTransformation:
    """`tx` with the updates of all but the hidden matrices multiplied by `ratio`.

    With any optimizer whose updates are proportional to its learning rate, embeddings, head and
    norms get a rate of their own.
    """
    if ratio == 1.0:
        return tx
    return with_factor(
        tx,
        ratio,
        lambda params: jax.tree.map_with_path(
            lambda path, leaf: not ng.hidden_matrices(path, leaf), params
        ),
    )


def with_factor(
    tx: optax.GradientTransformation, factor: float, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """`tx` with the updates that `mask` selects multiplied by `factor`."""
    return optax.chain(tx, optax.masked(optax.scale(factor), mask))


def default_learning_rate(name: str, width: int = NANO_WIDTH) -> float:
    """Peak learning rate of the optimizer called `name`, for random weights of a model.

    That of hidden matrices alone is inversely proportional to the width of the model
    (docs/experiments.md, "A larger model"); below the width of nano it is the one of nano.
    """
    entry = OPTIMIZERS[name]
    return entry.learning_rate / (_growth(width) if entry.unprojected_ratio else 1.0)


def default_unprojected_ratio(name: str, width: int = NANO_WIDTH) -> float | None:
    """Its ratio of the two rates, with which the other rate is the same at every width; None where
    the factory's own holds."""
    ratio = OPTIMIZERS[name].unprojected_ratio
    return ratio and ratio * _growth(width)


def trained_rates(name: str, adapter: str = "none") -> tuple[float, float | None]:
    """Peak learning rate and ratio of the two rates where trained weights are trained further.

    Those of docs/pretrained.md, "Training them further", where they were measured. Rates for random
    weights undo trained ones in a few steps: of the other optimizers a hundredth is taken.
    """
    entry = OPTIMIZERS[name]
    rate = _TRAINED_LORA if (name, adapter) == ("adamw", "lora") else entry.trained_learning_rate
    if rate is None:
        return 0.01 * entry.learning_rate, None
    return rate, _TRAINED_UNPROJECTED / rate


def _growth(width: int) -> float:
    return max(1.0, width / NANO_WIDTH)


def decayed(params: Any) -> Any:
    """The mask of weight decay: True for all leaves but norm scales."""
    return jax.tree.map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path).lower(), params
    )


def make_optimizer(
    config: OptimizerConfig, schedule: ScheduleConfig, *, steps: int, accumulate: int, seed: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The transformation that `config` describes, and its learning rate by step.

    With `accumulate` above one, the transformation takes that many micro-batch gradients to one
    step and returns zero updates in between.
    """
    peak = config.learning_rate
    peak = default_learning_rate(config.name) if peak is None else peak
    learning_rate = warmup_cosine(schedule, peak, steps)
    tx = make_transformation(config, learning_rate, seed=seed, mask=decayed)
    if accumulate > 1:
        tx = optax.MultiSteps(tx, accumulate).gradient_transformation()
    return tx, learning_rate


def make_transformation(
    config: OptimizerConfig, learning_rate: optax.Schedule, **given: Any
) -> optax.GradientTransformation:
    """The optimizer alone, with any learning rate. `given` are more of its arguments, such as
    `seed`, `mask` and `where`; it does not look at those that it does not have."""
    entry = OPTIMIZERS[config.name]
    chosen = {k: v for k, v in asdict(config).items() if v is not None}
    for name, value in entry.fixed.items():
        if chosen.setdefault(name, value) != value:
            raise ValueError(f"{name} is always {value}, got {chosen[name]}")
    if chosen.get("method") in ("svd", "eigh"):  # They have no use for a seed, and refuse one.
        given = {k: v for k, v in given.items() if k != "seed"}
    chosen |= given | {"learning_rate": learning_rate}
    known = inspect.signature(entry.factory).parameters
    # No weight decay is what an optimizer without that option does.
    any_optimizer = _OF_ANY_OPTIMIZER | (set() if config.weight_decay else {"weight_decay"})
    for name in chosen.keys() - given.keys() - known.keys() - any_optimizer:
        has = [n for n, e in OPTIMIZERS.items() if name in inspect.signature(e.factory).parameters]
        raise ValueError(
            f"{config.name} has no {name}, got {chosen[name]}; optimizers with it: {', '.join(has)}"
        )
    tx = entry.factory(**{k: v for k, v in chosen.items() if k in known})
    if config.unprojected_ratio is not None and "unprojected_ratio" not in known:
        tx = with_unprojected_ratio(tx, config.unprojected_ratio)
    if config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return tx
