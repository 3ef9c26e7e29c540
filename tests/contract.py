"""Every public transformation in each of its main forms, and a tree of parameters for all of them.

``FACTORIES`` maps a name to a function without arguments that builds the transformation. The
contract tests run over all of them; a new form of a transformation is added here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from composed import composed_adamw

import natgalore_jax as ng

# Small, and different sides: a wrong axis cannot hide. Equal ones are computed as one stack.
SHAPES: Mapping[str, Any] = {
    "dense": {"kernel": (12, 8), "bias": (8,), "twin": (12, 8)},
    "layers": {"kernel": (3, 8, 10), "scale": (3, 8)},
}
RANK, INTERVAL, HISTORY = 2, 4, 3

_project = {"rank": RANK, "update_interval": INTERVAL}
_natural = {**_project, "history": HISTORY}


def _adam_inside(**settings: Any) -> optax.GradientTransformation:
    return ng.chain(
        ng.low_rank_project(**{**_project, **settings}), optax.scale_by_adam(), ng.project_back()
    )


def _parts() -> optax.GradientTransformation:
    return ng.chain(
        optax.clip_by_global_norm(1.0),
        ng.low_rank_project(**_project),
        ng.woodbury_natural_gradient(history=HISTORY, damping=0.1),
        optax.scale_by_adam(),
        ng.project_back(scale=0.25),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(1e-2),
    )


FACTORIES: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "low_rank_project, adam, project_back": _adam_inside,
    "left": lambda: _adam_inside(side="left", transition="reset"),
    "right": lambda: _adam_inside(side="right", transition="keep", stagger=False),
    "both": lambda: _adam_inside(side="both"),
    "tucker": lambda: _adam_inside(rank=(2, 3, 2)),
    "axes": lambda: _adam_inside(
        axes=lambda params: {
            "dense": None,
            "layers": {"kernel": ng.MatrixAxes(rows=1, cols=(0, 2)), "scale": None},
        }
    ),
    "svd": lambda: _adam_inside(method="svd"),
    "gaussian": lambda: _adam_inside(method="gaussian"),
    "online": lambda: _adam_inside(method="online", update_interval=1),
    "bfloat16 basis": lambda: _adam_inside(basis_dtype=jnp.bfloat16),
    "all parts": _parts,
    "woodbury alone": lambda: ng.woodbury_natural_gradient(history=HISTORY, damping=0.1),
    "natural_galore": lambda: ng.natural_galore(**_natural),
    "natural_galore with residual": lambda: ng.natural_galore(
        **_natural, residual="fira", damping_mode="relative", damping=0.1
    ),
    "natural_galore in ng.chain": lambda: ng.chain(
        ng.natural_galore(**_natural), optax.adamw(0.01)
    ),
    "natural_galore in optax.chain": lambda: optax.chain(
        ng.natural_galore(**_natural), optax.adamw(0.01)
    ),
    "natural_galore_adamw": lambda: ng.natural_galore_adamw(
        optax.linear_schedule(0.0, 0.01, 3), **_project
    ),
    "clip_leading_singular_value": lambda: optax.chain(
        ng.scale_by_adam_8bit(), ng.clip_leading_singular_value(), optax.scale(-0.01)
    ),
    "several singular values": lambda: optax.chain(
        ng.chain(
            ng.low_rank_project(**_project),
            ng.project_back(residual="fisher", singular_limit=0.2, singular_values=2),
        ),
        ng.clip_leading_singular_value(0.1, singular_values=2),
        optax.scale(-0.01),
    ),
    "compact_natural_gradient": lambda: ng.chain(
        ng.low_rank_project(**_project, side="both"),
        ng.compact_natural_gradient(optax.scale_by_lion(), structure="full"),
        ng.project_back(residual="fisher"),
    ),
    "natural_galore_adamw with a history": lambda: composed_adamw(
        "stored",
        optax.linear_schedule(0.0, 0.01, 3),
        **_natural,
        damping=optax.constant_schedule(0.1),
    ),
    "galore_adamw with residual": lambda: ng.galore_adamw(0.01, **_project, residual="fira"),
    "scale_by_adam_8bit": lambda: ng.scale_by_adam_8bit(min_size=16),
    "scale_by_adam_8bit, factored": lambda: ng.scale_by_adam_8bit(min_size=16, factored=True),
    "lean_natural_galore_adamw": lambda: ng.lean_natural_galore_adamw(0.01, **_project),
    "8 bits in a subspace": lambda: ng.chain(
        ng.low_rank_project(**_project), ng.scale_by_adam_8bit(min_size=16), ng.project_back()
    ),
    "quantize_state in a subspace": lambda: ng.chain(
        ng.low_rank_project(**_project, side="both"),
        ng.quantize_state(optax.amsgrad(0.01), min_size=4),
        ng.project_back(),
    ),
    "4-bit bases, 8-bit history": lambda: composed_adamw(
        "stored", 0.01, **_natural, side="both", basis_dtype="int4", history_dtype=jnp.int8
    ),
    "8-bit Tucker bases, 4-bit history": lambda: ng.natural_galore(
        **{**_natural, "rank": (2, 3, 2)}, basis_dtype=jnp.int8, history_dtype="int4"
    ),
    "8-bit history alone": lambda: ng.woodbury_natural_gradient(
        history=HISTORY, damping=0.1, history_dtype="int8"
    ),
    "apollo_adamw": lambda: ng.contrib.apollo_adamw(0.01, **_project),
    "apollo_mini_adamw": lambda: ng.contrib.apollo_mini_adamw(0.01, update_interval=INTERVAL),
    "ldadamw": lambda: ng.contrib.ldadamw(0.01, rank=RANK, error_feedback=True),
    "alice_adamw": lambda: ng.contrib.alice_adamw(0.01, **_project, leading=1),
    "alice_adamw without tracking": lambda: ng.contrib.alice_adamw(
        0.01, **_project, leading=1, b3=0.0, norm_growth_limit=None
    ),
    "racs_adamw": lambda: ng.contrib.racs_adamw(0.01),
    "scale_sgd": lambda: ng.contrib.scale_sgd(0.01, head=lambda path, leaf: "dense" in path),
}


# The optimizers of Optax's own contract tests that take a gradient a step, at their rates there or
# near them.
OPTAX_OPTIMIZERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adabelief": lambda: optax.adabelief(1e-2),
    "adadelta": lambda: optax.adadelta(0.1),
    "adafactor": lambda: optax.adafactor(5e-3),
    "adafactor, factored": lambda: optax.adafactor(5e-3, min_dim_size_to_factor=3),
    "adagrad": lambda: optax.adagrad(1.0),
    "adam": lambda: optax.adam(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "adamaxw": lambda: optax.adamaxw(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "adan": lambda: optax.adan(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "fromage": lambda: optax.fromage(5e-3),
    "lamb": lambda: optax.lamb(1e-2),
    "lars": lambda: optax.lars(1.0),
    "lion": lambda: optax.lion(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "nadamw": lambda: optax.nadamw(1e-2),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, eta=1e-4, key=0),
    "novograd": lambda: optax.novograd(1e-2),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(2e-2),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1, 0.7, 0.1),
    "polyak_sgd": lambda: optax.polyak_sgd(1.0),
    "radam": lambda: optax.radam(5e-2),
    "rmsprop": lambda: optax.rmsprop(5e-3),
    "rmsprop, momentum": lambda: optax.rmsprop(5e-3, momentum=0.9, bias_correction=True),
    "rmsprop, centred": lambda: optax.rmsprop(5e-3, centered=True),
    "rmsprop, centred, corrected": lambda: optax.rmsprop(
        5e-3, eps=1e-3, centered=True, bias_correction=True
    ),
    "rprop": lambda: optax.rprop(0.1),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "sign_sgd": lambda: optax.sign_sgd(1e-2),
    "signum": lambda: optax.signum(1e-2),
    "sm3": lambda: optax.sm3(1.0),
    "yogi": lambda: optax.yogi(0.1),
    "contrib.acprop": lambda: optax.contrib.acprop(1e-3),
    "contrib.ademamix": lambda: optax.contrib.ademamix(1e-3),
    "contrib.adopt": lambda: optax.contrib.adopt(1e-2),
    "contrib.cocob": lambda: optax.contrib.cocob(),
    "contrib.dadapt_adamw": lambda: optax.contrib.dadapt_adamw(0.1),
    "contrib.dog": lambda: optax.contrib.dog(1.0),
    "contrib.dowg": lambda: optax.contrib.dowg(1.0),
    "contrib.galore": lambda: optax.contrib.galore(1e-2, rank=2),
    "contrib.madgrad": lambda: optax.contrib.madgrad(1e-2),
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.adam(0.1), weight_decay=0.0),
    "contrib.momo": lambda: optax.contrib.momo(0.1),
    "contrib.momo_adam": lambda: optax.contrib.momo_adam(0.1),
    "contrib.muon": lambda: optax.contrib.muon(1e-2),
    "contrib.prodigy": lambda: optax.contrib.prodigy(0.1),
    "contrib.reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau()
    ),
    "contrib.schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "contrib.schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(1e-2),
    "contrib.simplified_ademamix": lambda: optax.contrib.simplified_ademamix(1e-3),
    "contrib.sophia": lambda: optax.contrib.sophia(1e-2),
}


def zeros(dtype: Any = jnp.float32) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s, dtype), SHAPES, is_leaf=_is_shape)


def specs(dtype: Any = jnp.float32) -> Any:
    """The parameters as shapes and dtypes, without arrays."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), SHAPES, is_leaf=_is_shape)


def random_like(tree: Any, seed: int, scale: float = 1.0) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    )


def signature(tree: Any) -> Any:
    """Structure, shapes and dtypes: what must not change from step to step."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), _weak(x)), tree)


def _weak(x: Any) -> bool:
    return bool(getattr(jax.typeof(x), "weak_type", False))


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)
