"""Parameters that are nothing, hidden, of two dtypes, or no arrays, for every transformation."""

import warnings

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
    "apollo_adamw": lambda **k: ng.contrib.apollo_adamw(0.01, rank=RANK, **k),
    "ldadamw": lambda **k: ng.contrib.ldadamw(0.01, rank=RANK, **k),
    "alice_adamw": lambda **k: ng.contrib.alice_adamw(0.01, rank=RANK, leading=1, **k),
    "racs_adamw": lambda **k: ng.contrib.racs_adamw(0.01, **k),
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


def test_a_stack_of_no_layers_is_not_in_the_way_of_others(fast_compile):
    tx, params = ng.galore_adamw(0.01, rank=RANK), random_like(zeros(), 0)
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    params["empty"] = {"kernel": jnp.zeros((0, 8, 10))}
    actual, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert actual.pop("empty")["kernel"].shape == (0, 8, 10)
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
def test_scan_over_float32_gradients_of_bfloat16_parameters(name):
    """The carry of a scan has the same types at the end of a step, or it is an error."""
    tx, grads = OPTIMIZERS[name](), random_like(zeros(), 1)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (ng.training.apply_updates_stochastic(params, updates, t), state), None

    params = specs(jnp.bfloat16)
    carry = (params, jax.eval_shape(tx.init, params))
    new, _ = jax.eval_shape(lambda carry: jax.lax.scan(step, carry, jnp.arange(3)), carry)
    assert signature(new) == signature(carry)


@every_optimizer
def test_moments_are_float32_if_they_are_initialised_so(name):
    tx = OPTIMIZERS[name]()
    state = tx.init(zeros())
    _, new_state = jax.eval_shape(tx.update, specs(jnp.bfloat16), state, specs(jnp.bfloat16))
    assert signature(new_state) == signature(state)


@every_factory
def test_float64_arrays_of_numpy_are_float32_without_a_warning(name, fast_compile):
    params = jax.tree.map(lambda x: np.zeros(x.shape), specs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = FACTORIES[name]().init(params)
    assert signature(state) == signature(FACTORIES[name]().init(zeros()))


def test_a_step_without_jit_takes_float64_arrays_of_numpy(fast_compile):
    tx = ng.lean_natural_galore_adamw(0.01, rank=RANK)
    params = jax.tree.map(lambda x: np.ones(x.shape), specs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, _ = tx.update(params, tx.init(params), params)
    assert signature(updates) == signature(specs())


WHERE = {
    "dense": {"kernel": True, "bias": False, "twin": True},
    "layers": {"kernel": True, "scale": False},
}
AXES = {
    "dense": None,
    "layers": {"kernel": ng.MatrixAxes(rows=2, cols=1), "scale": None},
}


@every_optimizer
@pytest.mark.parametrize("around", ["masked", "partition", "partition of leaves", "None"])
def test_whole_trees_as_arguments_inside_masks_and_groups(name, around):
    """They have entries for what is hidden there; only those of the others matter."""
    tx, params = OPTIMIZERS[name](where=WHERE, axes=AXES), specs()
    seen = {"layers": params["layers"]}
    if around == "masked":
        tx = optax.masked(tx, MASK)
    elif around == "partition":
        labels = {"dense": "rest", "layers": "ours"}
        tx = optax.partition({"ours": tx, "rest": optax.set_to_zero()}, labels)
    elif around == "partition of leaves":
        labels = jax.tree.map(lambda w: "ours" if len(w.shape) == 3 else "rest", params)
        tx = optax.partition({"ours": tx, "rest": optax.set_to_zero()}, labels)
        seen = {"layers": {"kernel": params["layers"]["kernel"]}}
    else:  # as eqx.filter leaves it
        params = {**params, "dense": {"kernel": None, "bias": None, "twin": None}}
    updates, state, new_state = abstract_step(tx, params)
    assert signature(updates) == signature(params)
    assert signature(new_state) == signature(state)

    axes = {"layers": {k: AXES["layers"][k] for k in seen["layers"]}}
    expected = jax.eval_shape(OPTIMIZERS[name](axes=axes).init, seen)
    assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(expected)]
    default = jax.eval_shape(OPTIMIZERS[name]().init, seen)  # the axes matter
    assert [x.shape for x in jax.tree.leaves(state)] != [x.shape for x in jax.tree.leaves(default)]


def test_where_of_moments_inside_a_mask():
    tx = optax.masked(ng.scale_by_adam_8bit(min_size=4, where=WHERE), MASK)
    codes = jax.eval_shape(tx.init, specs()).inner_state.codes
    assert codes.mu["layers"]["kernel"].dtype == jnp.uint8
    assert codes.mu["layers"]["scale"].dtype == jnp.float32


def test_a_tree_that_does_not_fit_names_the_place():
    for argument in ("where", "axes"):
        tree = {"dense": {"kernel": None}, "layers": None}
        with pytest.raises(ValueError, match=rf"{argument} is not a prefix .*: dense is .*bias"):
            ng.galore_adamw(0.1, rank=2, **{argument: tree}).init(zeros())


IDENTITIES = {
    "low_rank_project": lambda rank: ng.low_rank_project(rank=rank),
    "project_back": lambda rank: ng.project_back(scale=rank),
    "chain": lambda rank: ng.chain(ng.low_rank_project(rank=rank)),
    "natural_galore": lambda rank: ng.natural_galore(rank=rank),
    "natural_galore_adamw": lambda rank: ng.natural_galore_adamw(0.1, rank=rank),
    "woodbury": lambda rank: ng.woodbury_natural_gradient(history=rank),
    "scale_by_apollo": lambda rank: ng.contrib.scale_by_apollo(rank=rank),
    "scale_by_ldadam": lambda rank: ng.contrib.scale_by_ldadam(rank=rank),
    "scale_by_alice": lambda rank: ng.contrib.scale_by_alice(rank=rank),
    "scale_by_racs": lambda rank: ng.contrib.scale_by_racs(iterations=rank),
    "scale_by_column_norms": lambda rank: ng.contrib.scale_by_column_norms(eps=rank),
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
    for module, some in (
        (ng, {"chain", "natural_galore_adamw", "MatrixAxes"}),
        (ng.training, {"per_layer"}),
        (ng.contrib, {"ldadamw"}),
    ):
        public = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        assert some <= public.keys()
        submodules = [public.pop(name) for name in ("training", "contrib") if name in public]
        assert submodules == ([ng.training, ng.contrib] if module is ng else [])
        assert all(v.__module__.startswith("natgalore_jax.") for v in public.values())


def test_flags_and_axes_may_be_a_tree_of_an_equinox_model():
    model = eqx.filter(eqx.nn.MLP(8, 8, 8, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    flags = jax.tree.map(lambda x: x.ndim > 1, model)
    axes = jax.tree.map(lambda x: ng.MatrixAxes(0, 1), model)
    for settings in ({"where": flags}, {"where": flags, "axes": axes}):
        state = jax.eval_shape(ng.galore_adamw(0.1, rank=2, **settings).init, model)
        mu = optax.tree.get(state, "mu")
        assert mu.layers[0].weight.shape == (2, 8) and mu.layers[0].bias.shape == (8,)
