"""The methods that are compared. A new one is one row of ``METHODS``."""

import ast
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

import natgalore_jax as ng
from benchmarks.pretraining.variants import recipe
from examples.common.errors import ConfigError
from examples.common.optimizers import (
    OPTIMIZERS,
    decayed,
    with_factor,
    with_unprojected_ratio,
)

PAPER_SCALE = 0.25  # of GaLore
_ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


class Setting(NamedTuple):
    """Arguments for a method; its factory gets those that it has a parameter for."""

    learning_rate: optax.Schedule
    rank: int
    update_interval: int
    seed: int
    unprojected_ratio: float = 1.0
    norm_ratio: float | None = None  # None: norms have the ratio of embedding and head
    weight_decay: float = 0.0
    mask: Callable[[Any], Any] = decayed


class Method(NamedTuple):
    """One row of the comparison.

    ``factory(**arguments)`` makes the optimizer, where the arguments are those of the setting that
    the factory knows, and then ``fixed``.
    """

    label: str
    factory: Callable[..., optax.GradientTransformation]
    fixed: Mapping[str, Any] = MappingProxyType({})
    # α by which the factory multiplies the updates of hidden matrices, beside its learning rate.
    scale: float = 1.0
    # A ratio of the two rates that is part of the method, and not tuned.
    ratio: float | None = None
    # Whether the best rate of the hidden matrices falls as the model gets wider.
    rate_falls: bool = True


def muon(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0, consistent_rms: float = 0.2
) -> optax.GradientTransformation:
    """Muon for the hidden matrices, AdamW for embedding, head and norms.

    Updates have the root mean square of AdamW's (Liu et al. 2025, "Muon is scalable for LLM
    training"), so that one learning rate serves both parts. The hidden matrices alone decay.
    """
    return optax.partition(
        {
            True: optax.contrib.muon(
                learning_rate,
                weight_decay=weight_decay,
                consistent_rms=consistent_rms,
                muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
            ),
            # Not the one that comes with Muon, which has Nesterov's momentum.
            False: optax.adamw(learning_rate, weight_decay=0.0),
        },
        lambda params: jax.tree.map_with_path(ng.hidden_matrices, params),
    )


def clipped_adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    mask: Any = None,
    singular_values: int = 1,
) -> optax.GradientTransformation:
    """AdamW with the leading singular values of hidden updates clipped, as in the default."""
    return optax.chain(
        optax.scale_by_adam(**_ADAMW),
        ng.clip_leading_singular_value(singular_values=singular_values),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def clipped(method: Method) -> Method:
    """A method with the leading singular value of its hidden updates clipped, as in the default.

    The bound is the default's for updates that are α times as large.
    """

    @functools.wraps(method.factory)
    def factory(learning_rate: optax.Schedule, **arguments: Any) -> optax.GradientTransformation:
        if arguments.get("weight_decay"):
            raise ConfigError("clipping is not implemented for a method with weight decay")
        return optax.chain(
            method.factory(1.0, **arguments),
            ng.clip_leading_singular_value(0.2 * method.scale),
            optax.scale_by_schedule(learning_rate),
        )

    return method._replace(label=f"{method.label}, clipped", factory=factory)


def optax_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: int,
    scale: float = PAPER_SCALE,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """``optax.contrib.galore`` on the hidden matrices: the longer side, an SVD of all at once."""
    return optax.contrib.galore(
        learning_rate,
        rank=rank,
        update_proj_gap=update_interval,
        scale=scale,
        weight_decay=weight_decay,
        mask=mask,
        # By default it would project embedding and head too.
        weight_dimension_numbers=lambda params: jax.tree.map_with_path(
            lambda path, leaf: (
                optax.contrib.GaLoreDimensionNumbers(0, 1)
                if ng.hidden_matrices(path, leaf)
                else None
            ),
            params,
        ),
    )


_ONLINE = {"method": "online", "scale": PAPER_SCALE}
_SVD = {"method": "svd", "stagger": False, "scale": PAPER_SCALE}

METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", optax.adamw, _ADAMW),
    "adamw-one-rate": Method("AdamW, one rate", optax.adamw, _ADAMW, ratio=1.0),
    "adamw-clipped": Method("AdamW, clipped", clipped_adamw),
    "adafactor": Method("Adafactor", OPTIMIZERS["adafactor"].factory),
    "muon": Method("Muon with AdamW", muon, rate_falls=False),
    "optax-galore": Method("GaLore, optax.contrib", optax_galore, scale=PAPER_SCALE),
    "galore": Method("GaLore", ng.galore_adamw, _SVD, scale=PAPER_SCALE),
    "galore-8bit": Method(
        "GaLore, 8-bit moments", ng.galore_adamw, {**_SVD, "moment_bits": 8}, scale=PAPER_SCALE
    ),
    "natural-galore-paper": Method(
        "Natural GaLore, paper", ng.paper_natural_galore_adamw, scale=PAPER_SCALE
    ),
    "natural-galore-published": Method(
        "Natural GaLore, published code", ng.published_natural_galore_adamw, scale=PAPER_SCALE
    ),
    "galore-online": Method("GaLore, online", ng.galore_adamw, _ONLINE, scale=PAPER_SCALE),
    # What the paper writes, spelled out: the defaults of this function are the recipe's.
    "natural-galore-online": Method(
        "Natural GaLore, paper, online",
        recipe,
        {
            **_ONLINE,
            "history": 10,
            "nesterov": False,
            "damping": 1e-3,
            "damping_mode": "absolute",
            "residual": "none",
            "singular_limit": None,
        },
        scale=PAPER_SCALE,
    ),
    "ldadam": Method("LDAdam", ng.contrib.ldadamw),
    "apollo": Method("APOLLO", ng.contrib.apollo_adamw),
    "apollo-mini": Method("APOLLO-Mini", ng.contrib.apollo_mini_adamw),
    # α and α_c of the paper; embedding and head have AdamW, as with the other low-rank methods.
    "alice": Method(
        "Alice", ng.contrib.alice_adamw, {"scale": 0.3, "compensation_scale": 0.4}, scale=0.3
    ),
    "racs": Method("RACS", ng.contrib.racs_adamw, {"scale": 0.05}, scale=0.05),
    # Its scripts have one rate, at which it would lack an advantage that all others have.
    "scale": Method("SCALE", ng.contrib.scale_sgd),
    "fira": Method(
        "Fira", ng.galore_adamw, {"residual": "fira", "scale": PAPER_SCALE}, scale=PAPER_SCALE
    ),
    "natural-galore": Method("Natural GaLore, default", ng.natural_galore_adamw),
    # A sixteenth of the width of nano.
    "natural-galore-lean": Method(
        "Natural GaLore, lean", ng.lean_natural_galore_adamw, {"rank": 8}
    ),
}

METHODS |= {
    f"{name}-clipped": clipped(METHODS[name])
    for name in ("galore", "apollo-mini", "racs", "scale", "fira")
}

# For questions about the default alone: in no sweep unless they are named.
VARIANTS = {"recipe": Method("Natural GaLore, in parts", recipe)}

# The tables' ablations, by the names that the runs have. Those with a damping or a residual are
# repeated as "recipe@...", where the residual "gain" is "fira".
CHANGES = {
    "natural-galore@moment_bits=8": "8-bit moments",
    # So much damping leaves the identity, up to a factor that the kept norm takes away.
    "natural-galore@damping=1e6": "without the Fisher matrix inside",
    "natural-galore@residual=gain": "without the Fisher matrix outside",
    "natural-galore@damping=1e6,residual=gain": "without either Fisher matrix",
}


class Chosen(NamedTuple):
    """A method with what the command line changed about it."""

    name: str
    method: Method
    changes: dict[str, Any]


def choose(text: str) -> Chosen:
    """A method by its name, or with other arguments: ``galore@rank=16,side=long``.

    Raises:
      ConfigError: if there is no such method, or it has no such argument.
    """
    name, at, changes = text.partition("@")
    known_methods = {**METHODS, **VARIANTS}
    if name not in known_methods:
        raise ConfigError(f"method must be one of {', '.join(known_methods)}; got {name!r}")
    method, chosen = known_methods[name], {}
    known = inspect.signature(method.factory).parameters
    for item in changes.split(",") if at else ():
        key, _, value = item.partition("=")
        if key not in known or key == "learning_rate":
            raise ConfigError(f"{name} has no argument {key!r}; it has {', '.join(known)}")
        chosen[key] = _literal(value)
    return Chosen(name, method, chosen)


def place(text: str) -> tuple[int, str]:
    """Place of a method in tables: in the order of ``METHODS``, others last, by name."""
    names = list(METHODS)
    base = text.partition("@")[0]
    return names.index(base) if base in names else len(names), text


def own_ratio(text: str) -> float | None:
    """The ratio of the rates that is part of a method, None where both rates are tuned.

    Of results too, whose methods or arguments the library may not have any more.
    """
    method = {**METHODS, **VARIANTS}.get(text.partition("@")[0])
    return None if method is None else method.ratio


def arguments(chosen: Chosen, setting: Setting) -> dict[str, Any]:
    """All arguments of the factory, its own defaults included."""
    signature = inspect.signature(chosen.method.factory)
    values = {**chosen.method.fixed, **chosen.changes}
    # What has no effect with a way of finding bases is refused.
    unused = {"online": {"update_interval"}, "svd": {"seed"}, "eigh": {"seed"}}
    dropped = unused.get(values.get("method", ""), set())
    offered = {k: v for k, v in setting._asdict().items() if k not in dropped}
    values = {**offered, **values}
    bound = signature.bind(**{k: v for k, v in values.items() if k in signature.parameters})
    bound.apply_defaults()
    return dict(bound.arguments)


def make(chosen: Chosen, setting: Setting, values: dict[str, Any]) -> optax.GradientTransformation:
    """The optimizer of ``values``, with the rates of the setting.

    A factory without the argument ``unprojected_ratio`` is given it from outside.
    """
    method = chosen.method
    tx = method.factory(**values)
    if "unprojected_ratio" not in values:
        tx = with_unprojected_ratio(tx, setting.unprojected_ratio * method.scale)
    if setting.norm_ratio is None:
        return tx
    return with_factor(
        tx,
        setting.norm_ratio / setting.unprojected_ratio,
        lambda params: jax.tree.map(operator.not_, decayed(params)),
    )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
