"""Parameters that are nothing, hidden, of two dtypes, or no arrays, for every transformation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import FACTORIES, RANK, random_like, signature, specs, zeros

import natgalore_jax as ng

every_factory = pytest.mark.parametrize("name", FACTORIES)
OPTIMIZERS = {
    "natural_galore_adamw": lambda **k: ng.natural_galore_adamw(0.01, rank=RANK, **k),
    "apollo_adamw": lambda **k: ng.apollo_adamw(0.01, rank=RANK, **k),
    "ldadamw": lambda **k: ng.ldadamw(0.01, rank=RANK, **k),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

MASK = {"dense": False, "layers": True}
NOTHING = {
    "no leaves": {},
    "None": {"dense": None},
    "a stack of no layers": {"kernel": jnp.zeros((0, 8, 10)), "scale": jnp.zeros((0, 8))},
    "no rows": {"kernel": jnp.zeros((0, 8))},
}


def abstract_step(tx, params, grads=None):
    """Update and the state before and after, as shapes."""
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, grads or params, state, params)
    return updates, state, new_state


@every_factory
def test_nothing_is_done_about_nothing(name):
    for what, params in NOTHING.items():
        if name == "axes" or (what == "no rows" and "Tucker" in name):
            continue  # made for other trees
        updates, state, new_state = abstract_step(FACTORIES[name](), params)
        assert signature(updates) == signature(params), what
        assert signature(new_state) == signature(state), what


@every_factory
def test_masks_and_groups_that_select_nothing(name):
    inner, labels = FACTORIES[name], {"dense": "rest", "layers": "rest"}
    for tx in (
        optax.masked(inner(), {"dense": False, "layers": False}),
        optax.partition({"none": inner(), "rest": optax.sgd(0.1)}, labels),
    ):
        updates, state, new_state = abstract_step(tx, specs())
        assert signature(updates) == signature(specs())
        assert signature(new_state) == signature(state)


@every_optimizer
def test_a_stack_of_no_layers_is_not_in_the_way_of_others(name, fast_compile):
    tx, params = OPTIMIZERS[name](), random_like(zeros(), 0)
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    params["empty"] = {"kernel": jnp.zeros((0, 8, 10))}
    actual, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert actual.pop("empty")["kernel"].shape == (0, 8, 10)
    if name != "apollo_adamw":  # whose random numbers depend on a matrix's place in the tree
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-6), actual, expected)


@pytest.mark.parametrize(
    "dtypes",
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")],
    ids=lambda d: "-".join(d),
)
@every_factory
def test_gradients_of_another_dtype_leave_states_as_they_are(name, dtypes):
    params, grads = map(specs, dtypes)
    updates, state, new_state = abstract_step(FACTORIES[name](), params, grads)
    if name != "natural_galore in optax.chain":  # where Optax keeps the moments
        assert signature(new_state) == signature(state)
    if "adamw" in name:
        expected, _, _ = abstract_step(optax.adamw(0.01), params, grads)
        assert signature(updates) == signature(expected)


@every_optimizer
def test_scan_over_float32_gradients_of_bfloat16_parameters(name, fast_compile):
    tx, params = OPTIMIZERS[name](), random_like(zeros(jnp.bfloat16), 0)
    grads = random_like(zeros(), 1)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (ng.apply_updates_stochastic(params, updates, optax.tree.get(state, "count")), state)

    state = tx.init(params)
    (new, new_state), _ = jax.jit(
        lambda carry: jax.lax.scan(lambda c, x: (step(c, x), None), carry, None, 3)
    )((params, state))
    assert signature((new, new_state)) == signature((params, state))


@every_optimizer
def test_moments_are_float32_if_they_are_initialised_so(name):
    tx = OPTIMIZERS[name]()
    state = tx.init(zeros())
    _, new_state = jax.eval_shape(tx.update, specs(jnp.bfloat16), state, specs(jnp.bfloat16))
    assert signature(new_state) == signature(state)


WHERE = {"dense": {"kernel": True, "bias": False}, "layers": {"kernel": True, "scale": False}}
AXES = {
    "dense": None,
    "layers": {"kernel": ng.MatrixAxes(rows=2, cols=1), "scale": None},
}


@every_optimizer
@pytest.mark.parametrize("around", ["masked", "partition", "partition of leaves", "None"])
def test_whole_trees_as_arguments_inside_masks_and_groups(name, around, fast_compile):
    """They have entries for what is hidden there; only those of the others matter."""
    tx = OPTIMIZERS[name](where=WHERE, axes=AXES)
    params = random_like(zeros(), 0)
    if around == "masked":
        tx = optax.masked(tx, MASK)
    elif around == "partition":
        labels = {"dense": "rest", "layers": "ours"}
        tx = optax.partition({"ours": tx, "rest": optax.set_to_zero()}, labels)
    elif around == "partition of leaves":
        labels = jax.tree.map(lambda w: "ours" if w.ndim == 3 else "rest", params)
        tx = optax.partition({"ours": tx, "rest": optax.set_to_zero()}, labels)
    else:  # as eqx.filter leaves it
        params = {**params, "dense": {"kernel": None, "bias": None}}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)

    alone = {"layers": {"kernel": random_like(zeros(), 0)["layers"]["kernel"]}}
    inner = OPTIMIZERS[name](axes={"layers": {"kernel": ng.MatrixAxes(rows=2, cols=1)}})
    expected, _ = jax.jit(inner.update)(alone, inner.init(alone), alone)
    if name == "apollo_adamw":
        assert bool(jnp.any(updates["layers"]["kernel"] != 0))
    else:
        np.testing.assert_allclose(
            updates["layers"]["kernel"], expected["layers"]["kernel"], rtol=1e-4, atol=1e-6
        )


def test_where_of_moments_inside_a_mask():
    tx = optax.masked(ng.scale_by_adam_8bit(min_size=4, where=WHERE), MASK)
    codes = jax.eval_shape(tx.init, specs()).inner_state.codes
    assert codes.mu["layers"]["kernel"].dtype == jnp.uint8
    assert codes.mu["layers"]["scale"].dtype == jnp.float32


def test_a_tree_that_does_not_fit_names_the_place():
    for argument in ("where", "axes"):
        tree = {"dense": {"kernel": None}, "layers": None}
        with pytest.raises(ValueError, match=rf"{argument} is no prefix .*: dense is .*bias"):
            ng.galore_adamw(0.1, rank=2, **{argument: tree}).init(zeros())


IDENTITIES = {
    "low_rank_project": lambda rank: ng.low_rank_project(rank=rank),
    "project_back": lambda rank: ng.project_back(scale=rank),
    "chain": lambda rank: ng.chain(ng.low_rank_project(rank=rank)),
    "natural_galore": lambda rank: ng.natural_galore(rank=rank),
    "natural_galore_adamw": lambda rank: ng.natural_galore_adamw(0.1, rank=rank),
    "woodbury": lambda rank: ng.woodbury_natural_gradient(history=rank),
    "scale_by_apollo": lambda rank: ng.scale_by_apollo(rank=rank),
    "scale_by_ldadam": lambda rank: ng.scale_by_ldadam(rank=rank),
    "scale_by_adam_8bit": lambda rank: ng.scale_by_adam_8bit(min_size=rank),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_transformation_equals_itself_alone(name):
    """As Optax's do. A static argument of jax.jit is looked up by equality."""
    two, four, again = (IDENTITIES[name](rank) for rank in (2, 4, 2))
    assert two == two and hash(two) == hash(two)
    assert two != four and four != two and two != again
    assert len({two, four, again}) == 3


def test_a_static_argument_is_not_taken_for_another():
    def rank_of(opener, params):
        tx = ng.chain(opener, ng.project_back())
        return tx.init(params)[0].basis[0]["w"]

    jitted = jax.jit(rank_of, static_argnums=0)
    params = {"w": jnp.ones((6, 8))}
    shapes = [jitted(ng.low_rank_project(rank=rank), params).shape for rank in (2, 4)]
    assert shapes == [(6, 2), (6, 4)]


@every_factory
def test_python_numbers_are_parameters(name):
    if name == "axes":
        return  # made for another tree
    tx, params = FACTORIES[name](), {**random_like(zeros(), 0), "gain": 0.5}
    updates, state, new_state = abstract_step(tx, params)
    assert jnp.shape(updates["gain"]) == () and updates["gain"].dtype == jnp.float32
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, new_state)]
    assert shapes[0] == shapes[1]


@every_optimizer
def test_parameters_of_eight_bits_are_refused_by_name(name):
    params = {"block": {"w": jnp.ones((8, 6), jnp.float8_e4m3fn)}, "b": jnp.ones(6)}
    with pytest.raises(TypeError, match=r"block/w: only parameters of 16 bits .*float8_e4"):
        OPTIMIZERS[name]().init(params)
    with pytest.raises(TypeError, match="block/w: only parameters of 16 bits or more"):
        ng.woodbury_natural_gradient(history=2).init(params)


@pytest.mark.parametrize(
    "factory",
    [*OPTIMIZERS.values(), ng.woodbury_natural_gradient, ng.scale_by_adam_8bit],
)
def test_a_whole_equinox_model_says_what_to_do(factory):
    model = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"activation: parameters must be arrays, .*eqx\.filter"):
        factory().init(model)
    factory().init(eqx.filter(model, eqx.is_inexact_array))


def test_only_what_is_meant_to_be_public_is():
    public = {name for name in vars(ng) if not name.startswith("_")}
    assert all(vars(ng)[name].__module__.startswith("natgalore_jax.") for name in public)
    assert {"chain", "natural_galore_adamw", "MatrixAxes"} <= public
