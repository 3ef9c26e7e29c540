"""Low-rank gradients exchanged between eight simulated devices: the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from tolerances import LOSSES, PARAMETERS

import natgalore_jax as ng
from benchmarks.distributed.collectives import exchanged_bytes
from natgalore_jax._src.refresh import refresh

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS, INTERVAL = 13, 6
M, N, RANK = 16, 48, 4

OPTIMIZERS = {
    "galore": functools.partial(ng.galore_adamw, 0.05, rank=RANK, update_interval=INTERVAL),
    # Not cautious: whether an entry has the sign of its gradient may depend on its last bit.
    "natural": lambda: ng.chain(
        ng.low_rank_project(rank=RANK, update_interval=INTERVAL),
        ng.compact_natural_gradient(optax.scale_by_adam(nesterov=True)),
        ng.project_back(singular_limit=0.2),
        optax.scale(-0.05),
    ),
    "history, right, svd": functools.partial(
        composed_adamw,
        "stored",
        0.05,
        rank=RANK,
        update_interval=INTERVAL,
        residual="none",
        history=3,
        damping=0.1,
        side="right",
        method="svd",
    ),
}


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["up"])
    hidden = hidden + jnp.tanh(jnp.einsum("bn,lnm->bm", hidden, params["stack"])) @ params["up"]
    return jnp.mean((hidden @ params["down"] + params["bias"] - jnp.roll(batch, 1, -1)) ** 2)


def start():
    shapes = {"up": (M, N), "down": (N, M), "stack": (3, N, M), "bias": (M,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params, jax.random.normal(jax.random.key(1), (STEPS, 32, M))


def ordinary(tx):
    """Losses and the last parameters on one device."""

    @jax.jit
    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    params, batches = start()
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, losses


def exchanging(tx, mesh, **options):
    step = ng.training.data_parallel_step(loss, tx, mesh, **options)
    params, batches = start()
    state, losses = tx.init(params), []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(value)
    return params, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_are_those_of_one_device(name, mesh):
    tx = OPTIMIZERS[name]()
    expected, expected_losses = ordinary(tx)
    params, losses = exchanging(tx, mesh)
    np.testing.assert_allclose(losses, expected_losses, **LOSSES)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **PARAMETERS), params, expected)


@pytest.mark.parametrize(
    "tx",
    [
        ng.galore_adamw(0.01, rank=2, update_interval=2, basis_dtype="int8"),
        ng.chain(ng.natural_galore(rank=2, history=2, update_interval=2), optax.sgd(0.01)),
    ],
    ids=["int8", "history"],
)
def test_a_second_explicit_axis_shards_the_parameters(tx):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = {"w": jnp.linspace(-1, 1, 8 * 12).reshape(8, 12)}
    batch = jax.random.normal(jax.random.key(0), (4, 8))

    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch @ params["w"]) ** 2)

    def steps(step, params):
        state = tx.init(params)
        for _ in range(3):
            params, state, _ = step(params, state, batch)
        return params["w"]

    @jax.jit
    def ordinary(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    expected = steps(ordinary, params)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, jax.P(None, "model"))
        found = steps(ng.training.data_parallel_step(loss, tx, mesh), sharded)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [jax.P("model"), jax.P(None, "model")], ids=["layers", "rows"])
@pytest.mark.parametrize("method", ["power", "svd"])
def test_a_second_explicit_axis_shards_a_stack(spec, method):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    # Two layers on each device of the second axis, single matrices that are refreshed together, and
    # one layer that has no gradient until its second step.
    shapes = {"stack": (8, 12, 8), "a": (8, 12), "b": (8, 12)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {n: jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys, strict=True)}
    specs = {"stack": spec, "a": jax.P("model"), "b": jax.P("model")}
    batches = jax.random.normal(jax.random.key(1), (4, 8, 8)).at[0, :, 7].set(0)
    tx = ng.chain(
        ng.low_rank_project(rank=2, update_interval=2, method=method),
        ng.woodbury_natural_gradient(history=2),
        optax.scale_by_adam(),
        ng.project_back(),
        optax.scale(-0.1),
    )

    def loss(params, batch):
        hidden = jnp.tanh(batch @ params["a"]) - jnp.tanh(batch @ params["b"])
        layers = jnp.einsum("bn,lnm->blm", hidden, params["stack"])
        return jnp.mean((layers * jnp.tanh(batch)[:, :, None]) ** 2)

    @jax.jit
    def ordinary(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    expected, expected_state = params, tx.init(params)
    for batch in batches:
        expected, expected_state, _ = ordinary(expected, expected_state, batch)
    with jax.set_mesh(mesh):
        found = {n: jax.device_put(x, jax.NamedSharding(mesh, specs[n])) for n, x in params.items()}
        state, step = tx.init(found), ng.training.data_parallel_step(loss, tx, mesh)
        for batch in batches:
            found, state, _ = step(found, state, batch)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **PARAMETERS), found, expected)


def test_micro_batches_are_exchanged_once(mesh):
    tx = ng.training.low_rank_steps(OPTIMIZERS["galore"]())

    # Two micro-batches of 2 rows on each of 8 devices: the first ones of all decide the bases.
    def in_steps():
        params, batches = start()
        state = OPTIMIZERS["galore"]().init(params)

        @jax.jit
        def step(params, state, batch):
            parts = batch.reshape(8, 2, 2, M).swapaxes(0, 1).reshape(2, 16, M)
            mean = optax.tree.zeros_like(tx.project(params, state))
            for i, part in enumerate(parts):
                state, mean = tx.accumulate(jax.grad(loss)(params, part), state, mean, i)
            updates, state = tx.update(mean, state, params)
            return optax.apply_updates(params, updates), state

        for batch in batches:
            params, state = step(params, state, batch)
        return params

    params, _ = exchanging(OPTIMIZERS["galore"](), mesh, micro_batches=2)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5), params, in_steps()
    )
    whole, parts = (compiled_bytes(mesh, n) for n in (1, 2))
    assert parts == whole


def test_micro_batches_in_16_bits_are_summed_in_32(mesh):
    """The first of 256 has a loss that the sum of the others must not be rounded to."""
    rows = jnp.zeros((8, 256, M), jnp.bfloat16).at[:, 0].set(1000).at[:, 1:].set(1)

    def update(dtype):
        params = {"up": jnp.ones((M, N), dtype), "bias": jnp.zeros(M, dtype)}

        def loss(params, x):
            return jnp.mean(jnp.sum(x * params["bias"] + (x @ params["up"]) @ jnp.ones((N, 1)), 1))

        tx = ng.chain(ng.low_rank_project(rank=RANK), ng.project_back(), optax.scale(-1.0))
        step = ng.training.data_parallel_step(loss, tx, mesh, micro_batches=256)
        new, _, _ = step(params, tx.init(params), rows.reshape(-1, M).astype(dtype))
        return jax.tree.map(lambda x: np.asarray(x, np.float64), new)

    found, expected = update(jnp.bfloat16), update(jnp.float32)
    # The mean itself is rounded once to each of gradient and update, 2⁻⁹ each.
    np.testing.assert_allclose(found["bias"], expected["bias"], rtol=2**-7)


def test_matrices_that_had_no_gradient_are_not_summed(mesh, monkeypatch):
    refreshed, refresh_matrix = [], refresh.refresh_matrix

    def counted(settings, plan, matrix, key, is_first):
        jax.debug.callback(lambda: refreshed.append(plan.shape))
        return refresh_matrix(settings, plan, matrix, key, is_first)

    monkeypatch.setattr(refresh, "refresh_matrix", counted)
    # No other test has these shapes, whose programs could be those without the counter.
    params = {
        "used": jnp.ones((9, 21)),
        "frozen": jnp.ones((9, 22)),
        "experts": jnp.ones((3, 9, 23)),
    }
    tx = ng.galore_adamw(0.01, rank=2, update_interval=100)

    def loss(params, x):
        frozen = jnp.sum(jax.lax.stop_gradient(params["frozen"]))
        return (
            jnp.mean((x @ params["used"]) ** 2) + jnp.mean((x @ params["experts"][1]) ** 2) * frozen
        )

    step, state = ng.training.data_parallel_step(loss, tx, mesh), tx.init(params)
    for expected in ({(9, 21), (3, 9, 23)}, set()):
        params, state, _ = step(params, state, jax.random.normal(jax.random.key(0), (8, 9)))
        jax.effects_barrier()
        # Each of the eight devices sums the two matrices that have a gradient, once.
        assert set(refreshed) == expected and len(refreshed) == 8 * len(expected)
        refreshed.clear()


def compiled_bytes(mesh, micro_batches):
    tx = OPTIMIZERS["galore"]()
    step = ng.training.data_parallel_step(loss, tx, mesh, micro_batches=micro_batches)
    params, batches = jax.eval_shape(start)
    rows = jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype)
    compiled = step.lower(params, jax.eval_shape(tx.init, params), rows).compile()
    return exchanged_bytes(compiled.as_text())


@pytest.mark.parametrize("micro_batches", [1, 64])
def test_a_loss_in_16_bits_is_averaged_in_32(mesh, micro_batches):
    step = ng.training.data_parallel_step(
        lambda params, x: jnp.mean(x @ params["w"]) ** 2 + jnp.bfloat16(5.0),
        ng.galore_adamw(0.1, rank=2),
        mesh,
        micro_batches=micro_batches,
    )
    params = {"w": jnp.zeros((8, 8), jnp.bfloat16)}
    *_, value = step(
        params, ng.galore_adamw(0.1, rank=2).init(params), jnp.ones((512, 8), "bfloat16")
    )
    assert value == 5.0 and value.dtype == jnp.bfloat16


def test_bytes_of_the_compiled_program(mesh):
    found = compiled_bytes(mesh, 1)
    # Every step: R of five matrices, 4 × 48 each, the bias, and the loss.
    assert found.always == 4 * (5 * RANK * N + M + 1)
    # The loop over due layers has one whole matrix at a time; there are three kinds of leaves. Of
    # each of the five matrices a flag says whether it has a gradient for its first refresh.
    assert found.sometimes == 4 * (3 * M * N + 5)


def test_errors(mesh):
    residual = ng.natural_galore_adamw(0.1, rank=2)
    with pytest.raises(ValueError, match=r"residual='none'"):
        ng.training.data_parallel_step(loss, residual, mesh)
    galore = OPTIMIZERS["galore"]()
    with pytest.raises(ValueError, match=r"axis_name='rows' is not an axis .*, \('data',\)"):
        ng.training.data_parallel_step(loss, galore, mesh, axis_name="rows")
    with pytest.raises(TypeError, match=r"loss must be a function .*, got 3"):
        ng.training.data_parallel_step(3, galore, mesh)
    with pytest.raises(ValueError, match="micro_batches"):
        ng.training.data_parallel_step(loss, galore, mesh, micro_batches=0)
    step = ng.training.data_parallel_step(lambda p, b: loss(p, b["x"]), galore, mesh, "data", 2)
    params, batches = jax.eval_shape(start)
    for shape in ((24, M), ()):
        batch = {"x": jax.ShapeDtypeStruct(shape, batches.dtype)}
        with pytest.raises(ValueError, match=r"^x of the batch .* 8 devices times 2 micro-batches"):
            step.lower(params, jax.eval_shape(galore.init, params), batch)
