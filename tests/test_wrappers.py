"""Wrappers of Optax inside a subspace: the numbers of what they wrap, or an error at init."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

PARAMS = {"v": {"u": jnp.ones((8, 12))}, "w": jnp.ones((9, 12)), "b": jnp.ones(12)}
ALL = jax.tree.map(lambda _: True, PARAMS)
LABELS = {"v": "a", "w": "b", "b": "a"}


def adam():
    return optax.scale_by_adam()


def inside(*inner, params=PARAMS, transition="rotate"):
    """Updates of four steps with a refresh at each second."""
    tx = ng.chain(
        ng.low_rank_project(rank=3, update_interval=2, transition=transition, stagger=False),
        *inner,
        ng.project_back(),
    )
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for key in jax.random.split(jax.random.key(0), 4):
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
        updates, state = update(grads, state, params)
        found.append(updates)
    return found


WRAPPERS = {
    "masked": lambda: optax.masked(adam(), ALL),
    "masked, callable": lambda: optax.masked(adam(), lambda p: jax.tree.map(lambda _: True, p)),
    "masked, prefix": lambda: optax.masked(adam(), {"v": True, "w": True, "b": True}),
    "partition": lambda: optax.partition({"a": adam(), "b": adam()}, LABELS),
    "named_chain": lambda: optax.named_chain(("adam", adam()), ("last", optax.identity())),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lambda b1: optax.scale_by_adam(b1))(0.9),
    "conditionally_transform": lambda: optax.conditionally_transform(
        adam(), lambda step: step > -1
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(adam(), lambda step: step > -1),
    "apply_if_finite": lambda: optax.apply_if_finite(adam(), 3),
    "selective_transform": lambda: optax.selective_transform(
        adam(), freeze_mask=jax.tree.map(lambda _: False, PARAMS)
    ),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(adam()),
    "snapshot": lambda: optax.chain(optax.snapshot("updates", lambda u: u), adam()),
    "monitor": lambda: optax.chain(
        optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}), adam()
    ),
    "quantize_state": lambda: ng.quantize_state(adam(), min_size=10**6),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_that_keeps_the_tree_has_the_numbers_of_what_it_wraps(name):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
        inside(WRAPPERS[name]()),
        inside(adam()),
    )


@pytest.mark.parametrize("params", [PARAMS, jnp.ones((9, 12))], ids=["tree", "array"])
@pytest.mark.parametrize("transition", ["rotate", "reset"])
def test_flattened_moments_cannot_be_transported(params, transition):
    message = r"State inside optax.flatten .* leave out optax.flatten, or set transition"
    for inner in (
        optax.flatten(adam()),
        optax.chain(optax.identity(), optax.flatten(optax.chain(optax.trace(0), adam()))),
        optax.flatten(ng.quantize_state(adam(), min_size=1)),
        ng.compact_natural_gradient(optax.flatten(adam())),
    ):
        with pytest.raises(ValueError, match=message):
            inside(inner, params=params, transition=transition)


def test_flattened_moments_are_kept():
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
        inside(optax.flatten(adam()), transition="keep"),
        inside(adam(), transition="keep"),
    )


@pytest.mark.parametrize("params", [PARAMS, jnp.ones((9, 12))], ids=["tree", "array"])
@pytest.mark.parametrize(
    "natural", [ng.woodbury_natural_gradient(2), ng.compact_natural_gradient(optax.trace(0.9))]
)
def test_a_natural_gradient_needs_the_tree(natural, params):
    with pytest.raises(ValueError, match=r"optax\.flatten .* leave (it|out)"):
        inside(optax.flatten(natural), params=params, transition="keep")


@pytest.mark.parametrize("params", [PARAMS, jnp.ones((9, 12))], ids=["tree", "array"])
def test_flattened_moments_are_not_silently_wide(params):
    with pytest.raises(ValueError, match=r"in 8 bits by parameter.*put it around quantize_state"):
        ng.quantize_state(optax.flatten(adam()), min_size=1).init(params)
    state = optax.flatten(ng.quantize_state(adam(), min_size=1)).init(params)
    assert state.codes.mu.dtype == jnp.uint8


def test_a_sum_of_updates_is_not_taken_in_two_bases():
    every = optax.apply_every(3)
    for inner in (every, optax.chain(adam(), every)):
        with pytest.raises(ValueError, match=r"apply_every .* after project_back, or .*MultiSteps"):
            inside(inner, transition="keep")


@pytest.mark.parametrize("transition", ["rotate", "reset"])
def test_a_sum_of_updates_is_transported(transition):
    """Gradients of one space: no refresh, of which one is within the sum, loses anything."""
    rng = np.random.default_rng(0)
    space = rng.normal(size=(9, 3))
    grads = [jnp.asarray(space @ rng.normal(size=(3, 12)), jnp.float32) for _ in range(3)]
    tx = ng.chain(
        ng.low_rank_project(rank=3, update_interval=2, transition=transition, stagger=False),
        optax.apply_every(3),
        ng.project_back(),
    )
    state = tx.init(grads[0])
    for G in grads:
        update, state = tx.update(G, state, grads[0])
    np.testing.assert_allclose(update, sum(np.float64(G) for G in grads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "search",
    [
        optax.scale_by_backtracking_linesearch(5),
        optax.scale_by_zoom_linesearch(5),
        optax.lbfgs(0.1),
    ],
)
def test_a_line_search_inside_a_subspace_is_refused(search):
    tx = ng.chain(ng.low_rank_project(rank=4), search, ng.project_back())
    with pytest.raises(ValueError, match="a line search is inside a subspace: put it after"):
        tx.init({"w": jnp.zeros((8, 12))})
