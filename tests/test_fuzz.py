"""Any tree of parameters with any settings: finite updates, or one of the documented errors.

``HYPOTHESIS_PROFILE=long`` runs 2,000 cases, others each time; by default there are 200, always the
same ones.
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from contract import signature
from flax import nnx
from flax.core import freeze
from hypothesis import HealthCheck, event, given, settings, strategies as st

import natgalore_jax as ng

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.timeout(0)]

KINDS = ("dict", "tuple", "empty subtrees", "linen", "nnx")  # of containers
settings.register_profile("fixed", max_examples=200 // len(KINDS), derandomize=True)
settings.register_profile("long", max_examples=2000 // len(KINDS), print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

STEPS = 4
SHAPES = [
    (1, 1), (1, 5), (4, 1), (3, 3), (7, 4), (5, 33), (2, 6, 4), (1, 4, 9), (3, 257, 65),
    (2, 2, 3, 5), (), (1,), (6,),
]  # fmt: skip
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])


class Case(NamedTuple):
    """Parameters in some container, and an optimizer with some settings."""

    params: Any
    factory: Any
    settings: dict[str, Any]


@st.composite
def trees(draw, kind):
    """Parameters of one to four leaves, nested, in one of the containers that libraries use."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    leaves = [jnp.zeros(shape, draw(DTYPES)) for shape in shapes]
    names = {f"w{i}": x for i, x in enumerate(leaves)}
    match kind:
        case "dict":
            return {"a": {"kernel": leaves[0]}, **names}
        case "tuple":
            return (tuple(leaves), [leaves[0]])
        case "empty subtrees":
            return {"none": None, "empty": {}, "also": (), "rest": names}
        case "linen":
            return freeze({"params": {"Dense_0": names}})
        case "nnx":
            return nnx.State({name: nnx.Param(x) for name, x in names.items()})


COMMON = {
    "rank": st.one_of(st.integers(1, 8), st.tuples(*[st.integers(1, 4)] * 3)),
    "update_interval": st.integers(1, 3),
    "side": st.sampled_from(["short", "long", "left", "right", "both"]),
    "basis_dtype": st.sampled_from([None, jnp.float32, jnp.bfloat16]),
    "where": st.sampled_from([ng.hidden_matrices, lambda path, leaf: leaf.ndim > 1, True]),
    "residual": st.sampled_from(["none", "fira", "fisher"]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
}
MOMENTS = {"moment_bits": st.sampled_from([None, 8])}
METHOD = {
    "method": st.sampled_from(["power", "svd", "eigh", "randomized", "gaussian", "online"]),
    "stagger": st.sampled_from([None, True, False]),
}
TRANSITION = {"transition": st.sampled_from(["rotate", "reset", "keep"])}
STORED = {
    "history": st.sampled_from([1, 3]),
    "damping": st.sampled_from([1e-3, 1.0]),
    "damping_mode": st.sampled_from(["absolute", "relative"]),
}
FACTORIES = {
    ng.galore_adamw: COMMON | METHOD | MOMENTS,
    ng.natural_galore_adamw: COMMON | MOMENTS,
    functools.partial(composed_adamw, "stored"): COMMON | METHOD | TRANSITION | STORED,
    functools.partial(composed_adamw, "none"): COMMON | METHOD | TRANSITION,
}


@st.composite
def cases(draw, kind):
    factory = draw(st.sampled_from(list(FACTORIES)))
    chosen = draw(st.fixed_dictionaries({}, optional=FACTORIES[factory]))
    return Case(draw(trees(kind)), factory, chosen)


def is_documented(error: Exception, case: Case) -> bool:
    """Whether the settings or the shapes are such that the docstrings promise this error."""
    chosen, text = case.settings, str(error)
    rank, where = chosen.get("rank", 128), chosen.get("where", ng.hidden_matrices)
    is_online = chosen.get("method") == "online"
    shapes = [x.shape for x in jax.tree.leaves(case.params)]
    if where is ng.hidden_matrices and isinstance(rank, tuple):
        shapes = [s for s in shapes if len(s) > 2 and min(s[-3:]) > max(rank)]
    elif where is ng.hidden_matrices:  # Those that the rank makes smaller.
        shapes = [s for s in shapes if len(s) > 1 and min(s[-2:]) > rank]
    elif where is not True:
        shapes = [s for s in shapes if len(s) > 1]
    reasons = {
        "where selects no parameter": not shapes,
        "axes": any(len(s) < 2 for s in shapes),
        "rank": isinstance(rank, tuple) and any(len(s) < 3 for s in shapes),
        "update_interval has no effect": is_online and chosen.get("update_interval", 1) != 1,
        "stagger has no effect": is_online and chosen.get("stagger") is not None,
        "side has no effect": isinstance(rank, tuple) and chosen.get("side", "short") != "short",
    }
    return any(applies for word, applies in reasons.items() if word in text)


def gradients(params, seed):
    """Normal numbers, of a size that differs between steps; in some steps zero."""
    rng = np.random.default_rng(seed)

    def like(x):
        scale = rng.choice([0.0, 1e-6, 1.0, 1e3])
        return jnp.asarray(scale * rng.standard_normal((STEPS, *x.shape)), x.dtype)

    return jax.tree.map(like, params)


def assert_orthonormal(state):
    for basis in jax.tree.leaves(state[0].basis):
        P = np.asarray(basis, np.float64).reshape(-1, *basis.shape[-2:])
        if basis.dtype == jnp.float32:
            gram = np.swapaxes(P, -1, -2) @ P
            identity = np.broadcast_to(np.eye(P.shape[-1]), gram.shape)
            np.testing.assert_allclose(gram, identity, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_tree_with_any_settings(kind, data, seed):
    case = data.draw(cases(kind))
    try:
        tx = case.factory(0.1, **case.settings)
        state = tx.init(case.params)
    except (TypeError, ValueError) as error:
        assert is_documented(error, case), error
        event("documented error")
        return

    @jax.jit
    def run(params, state, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, state), grads)

    (params, new_state), updates = run(case.params, state, gradients(case.params, seed))
    assert signature(params) == signature(case.params)
    assert signature(new_state) == signature(state)
    for x in jax.tree.leaves(updates):
        assert bool(jnp.all(jnp.isfinite(x)))
    assert_orthonormal(new_state)
    report = ng.memory_report(tx, case.params)
    assert report.total_state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
