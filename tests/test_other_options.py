"""A state that was made with other options is an error; a state that was only moved is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

PARAMS = {
    "block": {"w": jnp.ones((64, 96)), "b": jnp.ones(96)},
    "embed": jnp.ones((128, 64)),
    "lm_head": jnp.ones((64, 128)),
}
ADAM = optax.scale_by_adam()


def inside(inner=ADAM, residual="none", limit=1.01, **settings):
    opener = ng.low_rank_project(**{"rank": 4, **settings})
    return ng.chain(opener, inner, ng.project_back(1.0, residual, limit))


HISTORY = ng.woodbury_natural_gradient
APOLLO = functools.partial(ng.contrib.scale_by_apollo, 4)
RACS, LDADAM = ng.contrib.scale_by_racs, functools.partial(ng.contrib.scale_by_ldadam, 4)
ALICE = functools.partial(ng.contrib.scale_by_alice, 4)
EIGHT, QUANTIZED = ng.scale_by_adam_8bit, functools.partial(ng.quantize_state, ADAM)
FIRA = functools.partial(inside, residual="fira")
NATURAL = functools.partial(ng.natural_galore_adamw, 0.1, 16)

# Two optimizers, and what the error names if either of them gets the other's state.
PAIRS = {
    "rank": (inside(), inside(rank=6), "rank"),
    "modes": (
        ng.chain(ng.low_rank_project(1), optax.sgd(0.1)),
        ng.chain(ng.low_rank_project((1, 1, 1), where=lambda p, x: x.ndim > 2), optax.sgd(0.1)),
        "rank",
    ),
    "basis_dtype": (inside(), inside(basis_dtype="int8"), "basis_dtype"),
    "basis in bits": (inside(basis_dtype="int4"), inside(basis_dtype="int8"), "basis_dtype"),
    "residual": (FIRA(), inside(residual="fisher"), "residual or norm_growth_limit"),
    "no residual": (FIRA(), inside(), "residual"),
    "fira's limit": (FIRA(), FIRA(limit=None), "residual or norm_growth_limit"),
    "moment_bits": (NATURAL(), NATURAL(moment_bits=8), "moment_bits"),
    "inner": (inside(), inside(optax.scale_by_lion()), "ScaleByLionState"),
    "mask": (
        inside(optax.masked(ADAM, {"block": True, "embed": True, "lm_head": False})),
        inside(),
        "MaskedState",
    ),
    "history": (HISTORY(3), HISTORY(5), "history"),
    "history_dtype": (HISTORY(3), HISTORY(3, history_dtype="int8"), "history_dtype"),
    "history inside": (inside(HISTORY(3)), inside(HISTORY(3, history_dtype="int8")), "history"),
    "8 bits": (EIGHT(), EIGHT(min_size=10**6), "min_size"),
    "8 bits inside": (inside(EIGHT()), inside(EIGHT(min_size=32)), "min_size"),
    "8 bits, where": (EIGHT(), EIGHT(where=False), "where"),
    "8 bits, blocks": (EIGHT(), EIGHT(block_size=32), "block_size"),
    "factored": (EIGHT(), EIGHT(factored=None), "factored"),
    "quantize_state": (QUANTIZED(), QUANTIZED(min_size=10**6), "min_size"),
    "quantize_state, blocks": (QUANTIZED(), QUANTIZED(block_size=32), "block_size"),
    "apollo": (APOLLO(), APOLLO(norm_growth_limit=None), "norm_growth_limit"),
    "racs": (RACS(), RACS(norm_growth_limit=None), "norm_growth_limit"),
    "alice's limit": (ALICE(), ALICE(norm_growth_limit=None), "norm_growth_limit"),
    "alice's tracking": (ALICE(), ALICE(b3=0.0), "b3"),
    "ldadam": (LDADAM(), LDADAM(error_feedback=True), "error_feedback"),
    "optimizer": (APOLLO(), LDADAM(), "State is needed, but the state is of type"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_state_of_other_options_is_refused(name):
    *pair, message = PAIRS[name]
    params = {**PARAMS, "conv": jnp.ones((3, 4, 5))} if name == "modes" else PARAMS
    for old, new in (pair, pair[::-1]):
        state = jax.eval_shape(old.init, params)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(new.update, params, state, params)


# The other way round nothing says that the old dtype was not that of the parameters.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (inside(), inside(basis_dtype="bfloat16")),
        (HISTORY(3), HISTORY(3, history_dtype="bfloat16")),
        (inside(HISTORY(3)), inside(HISTORY(3, history_dtype="bfloat16"))),
        (inside(), inside(optax.scale_by_adam(mu_dtype="bfloat16"))),
        (APOLLO(), APOLLO(mu_dtype="bfloat16")),
        (LDADAM(), LDADAM(mu_dtype="bfloat16")),
        (RACS(), RACS(mu_dtype="bfloat16")),
        (ng.contrib.scale_sgd(0.1), ng.contrib.scale_sgd(0.1, mu_dtype="bfloat16")),
    ],
)
def test_a_dtype_that_is_given_is_required(old, new):
    with pytest.raises(ValueError, match="_dtype"):
        new.update(PARAMS, old.init(PARAMS), PARAMS)


LEGAL = {
    "fisher": inside(residual="fisher"),
    "fira": FIRA(basis_dtype="int8"),
    "history": inside(HISTORY(2, history_dtype="int4")),
    "bfloat16": inside(HISTORY(2, history_dtype="bfloat16"), basis_dtype="bfloat16"),
    "8 bits": inside(EIGHT(min_size=32)),
    "lean": ng.lean_natural_galore_adamw(0.1, 4),
    "quantized": inside(QUANTIZED(min_size=32)),
    "quantized outside": QUANTIZED(),
    "history outside": HISTORY(2, history_dtype="int8"),
    "apollo": APOLLO(mu_dtype="bfloat16"),
    "alice": ALICE(),
    "ldadam": LDADAM(),
    "racs": RACS(),
    "scale": ng.contrib.scale_sgd(0.1),
}


@pytest.mark.parametrize("name", LEGAL)
def test_parameters_at_init_and_gradients_may_have_other_dtypes(name):
    tx = LEGAL[name]
    for init, update in (
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
    ):
        state = jax.eval_shape(tx.init, optax.tree.cast(PARAMS, init))
        grads = optax.tree.cast(PARAMS, update)
        jax.eval_shape(tx.update, grads, state, grads)


@pytest.mark.parametrize("name", LEGAL)
def test_float64_is_accepted(name):
    tx = LEGAL[name]
    with jax.enable_x64(True):
        for dtype in ("float64", "float32"):
            params = jax.tree.map(lambda x, t=dtype: np.asarray(x, t), PARAMS)
            state = jax.eval_shape(tx.init, params)
            jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("name", LEGAL)
def test_a_state_may_be_restored_mapped_or_in_a_loop(name):
    tx = LEGAL[name]
    restored = jax.tree.map(np.asarray, tx.init(PARAMS))
    jax.eval_shape(tx.update, PARAMS, restored, PARAMS)

    def step(state, grads):
        return tx.update(grads, state, PARAMS)[1], None

    several = jax.tree.map(lambda x: jnp.stack([x] * 3), PARAMS)
    jax.eval_shape(functools.partial(jax.lax.scan, step), restored, several)
    states = jax.eval_shape(jax.vmap(tx.init), several)
    jax.eval_shape(jax.vmap(tx.update), several, states, several)


@pytest.mark.parametrize("tx", [EIGHT(min_size=4096), QUANTIZED(min_size=4096)])
def test_shards_may_be_smaller_than_their_parameters(tx):
    """Codes of a sharded embedding, in a loop over shards that are too small for codes."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"embed": jnp.ones((64, 96))}
    state = tx.init(params)
    specs = jax.tree.map(lambda x: jax.P("data") if x.ndim and x.shape[0] == 64 else jax.P(), state)
    update = jax.shard_map(
        lambda g, state: tx.update(g, state)[0],
        mesh=mesh,
        in_specs=(jax.P("data"), specs),
        out_specs=jax.P("data"),
        check_vma=False,
    )
    found = jax.jit(update)(params, state)
    expected, _ = tx.update(params, state)
    np.testing.assert_allclose(found["embed"], expected["embed"], rtol=1e-3)
