"""Bases and histories of eight and four bits in the state of an optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from jax.sharding import AxisType, NamedSharding
from oracles import linear_codes as oracle
from replay import through_orbax

import natgalore_jax as ng
from natgalore_jax._src.kernels.linear_codes import LinearCodes, decode, encode

pytestmark = pytest.mark.usefixtures("fast_compile")

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


STEPS, X, W = 80, normal(128, 24), {"stack": normal(2, 24, 33) / 5, "bias": normal(33)}
Y = X @ W["stack"] + W["bias"] + 0.5 * normal(2, 128, 33)


def loss(params, rows):
    """Of two linear regressions with noisy targets, which leave 0.25."""
    return jnp.mean((X[rows] @ params["stack"] + params["bias"] - Y[:, rows]) ** 2)


@functools.cache
def trained(basis_dtype):
    """Loss on all rows by step, training on half of them."""
    tx = ng.natural_galore_adamw(
        optax.cosine_decay_schedule(0.025, STEPS), 8, update_interval=7, basis_dtype=basis_dtype
    )

    def step(carry, t):
        params, state = carry
        rows = jax.random.permutation(jax.random.fold_in(jax.random.key(0), t), 128)[:64]
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), loss(params, slice(None))

    run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), jnp.arange(STEPS)))
    start = jax.tree.map(jnp.zeros_like, W)
    (_, state), losses = run(start, tx.init(start))
    return losses, state


@pytest.mark.parametrize("dtype,distance,at_the_end", [("int8", 0.005, 1e-3), ("int4", 0.05, 2e-3)])
def test_training_goes_as_with_floats(dtype, distance, at_the_end):
    """Four bits, whose rounding moves every basis, end at a loss that differs by 0.14 %."""
    (floats, _), (losses, _) = trained(None), trained(dtype)
    assert floats[-1] < 0.3 < 1.5 < floats[0]
    np.testing.assert_allclose(losses, floats, rtol=distance)
    np.testing.assert_allclose(losses[-1], floats[-1], rtol=at_the_end)


NATURAL = ng.chain(
    ng.low_rank_project(4, update_interval=2, basis_dtype="int8"),
    ng.woodbury_natural_gradient(2, 1.0, history_dtype="int4"),
)
GRADS = {"up": normal(6, 32), "down": normal(2, 48, 6)}


def natural_gradients(grads):
    """After three steps and a refresh: updates and state."""
    state, update = jax.jit(NATURAL.init)(grads), jax.jit(NATURAL.update)
    for _ in range(3):
        updates, state = update(grads, state)
    return updates, state


on_one_device = functools.cache(lambda: natural_gradients(GRADS))


def test_gram_matrices_are_those_of_the_columns_as_they_are_stored():
    history = on_one_device()[1][1].history
    for name, shape in (("up", (2, 4, 32)), ("down", (2, 2, 48, 4))):
        columns = LinearCodes(*(field[name] for field in history.columns))
        nb = len(shape) - 3
        H = np.asarray(decode(columns, shape, batch=nb + 1), np.float64).reshape(*shape[:-2], -1)
        gram = H @ np.swapaxes(H, -1, -2)
        np.testing.assert_allclose(history.gram[name], gram, atol=1e-5 * np.abs(gram).max())


@pytest.mark.parametrize("dtype,bits", [("int8", 8), ("int4", 4)])
def test_natural_gradients_are_those_of_the_rounded_gradients(dtype, bits):
    """Against a dense solve in float64, with an odd vector, a matrix and a number."""
    shapes = {"vector": (7,), "matrix": (5, 9), "number": ()}
    tx = ng.woodbury_natural_gradient(2, 0.3, "absolute", dtype)
    random = np.random.default_rng(1)
    grads = [
        {name: jnp.asarray(random.standard_normal(s), jnp.float32) for name, s in shapes.items()}
        for _ in range(3)
    ]
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for g in grads:
        natural, state = update(g, state)
    for name, shape in shapes.items():
        h = [np.asarray(g[name]) for g in grads[-2:]]
        if shape:  # what has no axis has no block and stays a float
            axis = int(np.argmax(shape))
            h = [oracle.decode(*oracle.encode(x, bits, axis, 256), axis, 256) for x in h]
        H = np.stack([x.ravel() for x in h], 1).astype(np.float64)
        expected = np.linalg.solve(0.3 * np.eye(len(H)) + H @ H.T, H[:, -1])
        np.testing.assert_allclose(np.ravel(natural[name]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "dtype,projector,gram", [("float32", 1e-4, 1e-5), ("int8", 0.0095, 0.011), ("int4", 0.17, 0.2)]
)
def test_distance_of_projectors_and_loss_of_orthonormality(dtype, projector, gram):
    """At rank 64 of 256. The largest of 64 normal numbers is 2.5 times their root mean square, so
    that rounding makes a relative error of 2.5 / (127 √12) or 2.5 / (7 √12), the projector one of
    √2 times that; in the spectral norm of PᵀP − I nearly twice."""
    G = np.random.default_rng(2).standard_normal((256, 256)) * np.geomspace(1, 1e-3, 256)
    tx = ng.chain(ng.low_rank_project(64, method="svd", basis_dtype=dtype), optax.identity())
    state = tx.init({"w": jnp.zeros(G.shape)})
    _, state = jax.jit(tx.update)({"w": jnp.asarray(G, jnp.float32)}, state)
    basis = state[0].basis
    if dtype == "float32":
        P = np.asarray(basis[0]["w"], np.float64)
    else:
        P = np.asarray(decode(LinearCodes(basis.codes[0]["w"], basis.scales[0]["w"]), (256, 64)))
    U = np.linalg.svd(G)[0][:, :64]
    assert np.linalg.norm(P @ P.T - U @ U.T) / np.linalg.norm(U @ U.T) < projector
    assert np.linalg.norm(P.T @ P - np.eye(64), 2) < gram


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_rounding_leaves_of_a_gradient_is_not_blown_up(dtype):
    """A gradient that lies in the subspace has no residual but the error of the stored basis.

    Its energy ``‖G‖² − ‖PᵀG‖²`` cannot be told from zero, whose inverse root it would take.
    """
    tx = ng.chain(
        ng.low_rank_project(16, method="svd", basis_dtype=dtype),
        ng.project_back(scale=0.0, residual="fisher", residual_scale=1.0),
    )
    random = np.random.default_rng(3)
    G = random.standard_normal((64, 16)) @ random.standard_normal((16, 80))
    grads = {"w": jnp.asarray(G, jnp.float32)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    # A residual of its own has a root mean square of one in each column.
    assert float(jnp.max(jnp.sqrt(jnp.mean(jnp.square(updates["w"]), 0)))) < 1.2


@pytest.mark.parametrize(("m", "expected"), [(128, 1.2e-3), (2048, 3e-4)])
def test_energy_of_a_residual_beside_a_stored_basis(m, expected):
    """``‖g‖² − ‖P̂ᵀg‖²`` is off by 2 (p·g)(δ·g) for each column p of P with the rounding error δ.

    With δ uniform within steps of 3 / (127 √m) that is 2 · 3 / (127 √(12 m)) of ``‖g‖²`` for a g in
    one column of P.
    """
    random = np.random.default_rng(4)
    P = np.linalg.qr(random.standard_normal((m, 8)))[0]
    stored = np.asarray(decode(encode(jnp.asarray(P, jnp.float32), 8), P.shape), np.float64)
    R = stored.T @ P
    outside = np.linalg.norm(P - stored @ R, axis=0) ** 2
    error = 1 - np.linalg.norm(R, axis=0) ** 2 - outside
    rms = np.sqrt(np.mean(error**2))
    assert expected / 2 < rms < 2 * expected, rms
    assert np.min(error) < 0 < np.max(error)


def test_bytes_from_shapes():
    params = {
        "wide": jax.ShapeDtypeStruct((4, 512, 1376), jnp.bfloat16),
        "odd": jax.ShapeDtypeStruct((301, 700), jnp.float32),
    }
    r, s = 128, 5

    def parts(dtype):
        tx = composed_adamw("stored", 1.0, r, history=s, basis_dtype=dtype, history_dtype=dtype)
        report = ng.memory_report(tx, params)
        state = jax.eval_shape(tx.init, params)
        assert report.total_state_bytes == sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(state)
        )
        return report.part_bytes

    basis, columns = 4 * 512 * r + 301 * r, s * (4 * 1376 * r + 700 * r)
    small = 4 * (4 + 1) * (s * s + s + 1)
    # One scale for the r numbers of a row of P, or of a column of R.
    scales = 2 * (4 * 512 + 301), 2 * s * (4 * 1376 + 700)
    assert parts("int8")["basis"] == basis + scales[0]
    assert parts("int8")["history"] == columns + scales[1] + small
    assert parts("int4")["basis"] == (basis + r) // 2 + scales[0]  # 301 rows are 151 pairs
    assert parts("int4")["history"] == columns // 2 + scales[1] + small
    foretold = {
        side: ng.memory_report(
            composed_adamw(
                "stored",
                1.0,
                r,
                residual="none",
                history=s,
                basis_dtype="int4",
                history_dtype="int8",
                side=side,
            ),
            params,
        )
        for side in ("short", "both")
    }
    short, both = (foretold[side].total_state_bytes for side in ("short", "both"))
    assert abs(foretold["short"].alternative_state_bytes["both"] - both) < 0.002 * both < short


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters(axis_type):
    """The blocks and the pairs of the histories run along sharded axes here."""
    expected, state = on_one_device()
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    specs = {"up": jax.P(None, "model"), "down": jax.P(None, "model", None)}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    with jax.set_mesh(mesh):
        sharded, new_state = natural_gradients(jax.device_put(GRADS, shardings))
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
    for name, sharding in shardings.items():
        np.testing.assert_allclose(sharded[name], expected[name], rtol=1e-4, atol=1e-5)
        assert sharded[name].sharding.is_equivalent_to(sharding, sharded[name].ndim)


def test_a_checkpoint_keeps_codes(tmp_path):
    _, state = on_one_device()
    restored = through_orbax(state, state, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("bad", ["int16", jnp.uint8, "int3", 8])
def test_other_dtypes_are_refused(bad):
    for arguments in ({"basis_dtype": bad}, {"history": 2, "history_dtype": bad}):
        with pytest.raises(TypeError, match=r"_dtype must be a floating-point dtype, int8 or int4"):
            ng.natural_galore(**arguments)
    with pytest.raises(ValueError, match="rounding to 4 bits loses"):
        ng.galore_adamw(1.0, method="online", basis_dtype="int4")


def test_stacked_vectors_have_no_factors():
    """Each layer of a stack of norms is updated as its own vector is."""
    rng, tx = np.random.default_rng(0), ng.scale_by_adam_8bit(min_size=16, factored=True)
    stack = jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
    stacked, _ = tx.update({"norm": {"scale": stack}}, tx.init({"norm": {"scale": stack}}))
    for layer, found in zip(stack, stacked["norm"]["scale"], strict=True):
        alone, _ = tx.update({"norm": {"scale": layer}}, tx.init({"norm": {"scale": layer}}))
        np.testing.assert_allclose(found, alone["norm"]["scale"], rtol=1e-5)
