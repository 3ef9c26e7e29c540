"""Optimizers with moments in 8 bits, beside the same ones in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import signature
from jax.sharding import AxisType, NamedSharding
from oracles import eight_bits as oracle
from replay import through_orbax, updates_of

import natgalore_jax as ng
from natgalore_jax._src.kernels.dither import STRIDES
from natgalore_jax._src.kernels.float8_blocks import decode

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPE = (96, 64)


def gradients(steps, shape=SHAPE, spread=1.0, seed=0):
    """Noise around a mean that changes, and entries whose sizes differ by factors of e."""
    rng = np.random.default_rng(seed)
    size = np.exp(spread * rng.standard_normal(shape)) * 1e-3
    mean = 0.3 * size * rng.standard_normal(shape)
    return [
        {"w": jnp.asarray(mean * np.cos(t / 40) + size * rng.standard_normal(shape), jnp.float32)}
        for t in range(steps)
    ]


def relative(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_three_steps_of_adam_number_by_number():
    """Against Adam in NumPy whose moments go through the format's definition at every step."""
    grads = gradients(3, shape=(70, 3))
    tx = ng.scale_by_adam_8bit(min_size=1)
    state = tx.init(grads[0])
    m, v = np.zeros((2, 70, 3))
    bounds = np.zeros((2, 3), np.float32)
    for t, g in enumerate(grads):
        updates, state = tx.update(g, state)
        g = np.asarray(g["w"], np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(updates["w"], expected, rtol=2e-5, atol=1e-6)
        peak = np.abs(g).max(0)
        bounds[0] = 0.9 * bounds[0] + 0.1 * peak
        bounds[1] = 0.999 * bounds[1] + 0.001 * peak**2
        for k, (x, field) in enumerate(((m, "mu"), (v, "nu"))):
            scale = np.asarray(getattr(state.scales, field)["w"])
            np.testing.assert_allclose(scale[0], bounds[k], rtol=1e-6)
            u = oracle.dithers(x.shape, t, k, int(STRIDES[1 - k]))
            codes = np.asarray(getattr(state.codes, field)["w"])
            for i, j in np.ndindex(*x.shape):
                c = oracle.c_of(float(scale[0, j]), bool(k))
                code = oracle.nearest_or_dithered(x[i, j], c, bool(k), int(u[i, j]))
                # Float32 and float64 may fall on two sides of a threshold.
                assert abs(int(codes[i, j]) - code) <= 1, (field, t, i, j)
                x[i, j] = oracle.number(int(codes[i, j]), c, bool(k))


OPTIMIZERS = {
    "scale_by_adam_8bit": ng.scale_by_adam_8bit,
    "quantize_state": lambda **kw: ng.quantize_state(optax.scale_by_adam(), **kw),
}
both = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@both
def test_a_long_run_stays_near_float32_adam(make):
    grads = gradients(400)
    (reference, full), (updates, state) = (
        updates_of(optax.scale_by_adam(), grads),
        updates_of(make(), grads),
    )
    # Rounded to nearest the second moments stand still and the updates are wrong by half.
    assert relative(updates[-200:], reference[-200:]) < 0.12
    assert max(float(jnp.max(jnp.abs(u["w"]))) for u in updates) < 2 * max(
        float(jnp.max(jnp.abs(u["w"]))) for u in reference
    )
    v = np.asarray(decode(state.codes.nu["w"], state.scales.nu["w"], is_second=True))
    # A ratio near one with a spread of a tenth: its mean over 6,144 entries is known to 0.002.
    assert abs(np.mean(v / np.asarray(full.nu["w"])) - 1) < 0.02


@both
def test_entries_that_fall_silent_come_to_rest(make):
    grads = gradients(260, spread=0.5)
    silent = np.zeros(SHAPE, bool)
    silent[::3] = True  # whole blocks
    silent[:, ::3] = True  # parts of blocks
    grads = [{"w": jnp.where(silent & (t >= 60), 0, g["w"])} for t, g in enumerate(grads)]
    updates, _ = updates_of(make(), grads)
    last = np.asarray(updates[-1]["w"])
    assert np.abs(last[silent]).max() < 1e-6 and np.abs(last[~silent]).min() > 0


def test_both_have_one_form_of_state():
    g = gradients(1)[0]
    states = [make().init(g) for make in OPTIMIZERS.values()]
    assert signature(states[0]) == signature(states[1])
    assert states[0].codes.mu["w"].dtype == jnp.uint8
    assert states[0].scales.nu["w"].shape == (96, 1)


@both
def test_small_leaves_and_those_left_out_are_adams_own(make):
    rng = np.random.default_rng(0)
    shapes = {"large": (64, 80), "out": (64, 80), "small": (8, 8), "vector": (30,)}
    grads = [
        {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
        for _ in range(5)
    ]
    updates, state = updates_of(make(where=lambda path, leaf: "out" not in path), grads)
    reference, _ = updates_of(optax.scale_by_adam(), grads)
    for name in shapes:
        assert (state.codes.mu[name].dtype == jnp.uint8) == (name == "large")
        if name != "large":
            np.testing.assert_allclose(updates[-1][name], reference[-1][name], rtol=1e-5, atol=1e-6)


def test_nesterov_and_eps_root_are_those_of_optax():
    kw = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-6, "nesterov": True}
    g = gradients(4)
    ours, _ = updates_of(ng.scale_by_adam_8bit(**kw, min_size=10**6), g)
    theirs, _ = updates_of(optax.scale_by_adam(**kw), g)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-5, atol=1e-6)


def test_a_saturated_count_is_that_of_optax():
    last, g = jnp.int32(2**31 - 1), gradients(1)[0]
    (ours, _), (theirs, _) = (
        tx.update(g, tx.init(g)._replace(count=last))
        for tx in (ng.scale_by_adam_8bit(nesterov=True), optax.scale_by_adam(nesterov=True))
    )
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-5)


@both
def test_scalars_have_no_blocks(make):
    grads = [{"w": jnp.ones((8, 64)), "gain": jnp.float32(3.0)}] * 2
    updates, state = updates_of(make(min_size=1), grads)
    assert (state.codes.mu["w"].dtype, state.codes.mu["gain"].dtype) == (jnp.uint8, jnp.float32)
    np.testing.assert_allclose(updates[-1]["gain"], 1.0, rtol=1e-4)


NAMES = {"embedding": (32, 8), "experts": {"lm_head": (2, 8, 32)}, "kernel": (32, 8), "norm": (8,)}


def test_factored_second_moments():
    """Against Adam in NumPy; names select embeddings and heads, and leading axes are kept."""
    rng = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    grads = [
        # Small, so that products of two second moments would underflow.
        jax.tree.map(
            lambda s: 1e-12 * rng.standard_normal(s).astype(np.float32), NAMES, is_leaf=is_shape
        )
        for _ in range(4)
    ]
    tx = ng.scale_by_adam_8bit(0.8, 0.9, 1e-15, min_size=10**6, factored=None)
    updates, state = updates_of(tx, grads)
    shapes = jax.tree.map(jnp.shape, (state.codes.nu, state.scales.nu))
    assert shapes[0] == {
        "embedding": (32,),
        "experts": {"lm_head": (2, 8)},
        "kernel": (32, 8),
        "norm": (8,),
    }
    assert shapes[1]["embedding"] == (8,) and shapes[1]["experts"] == {"lm_head": (2, 32)}

    def adam(grads, is_factored):
        m, rows, columns, v, t = 0.0, 0.0, 0.0, 0.0, len(grads)
        for g in np.float64(grads):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            rows = 0.9 * rows + 0.1 * np.mean(g**2, -1, keepdims=True)
            columns = 0.9 * columns + 0.1 * np.mean(g**2, -2, keepdims=True)
        if is_factored:
            v = rows * columns / np.mean(rows, -2, keepdims=True)
        return m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-15)

    for name in NAMES:
        own = [jax.tree.leaves(g[name])[0] for g in grads]
        (got,) = jax.tree.leaves(updates[-1][name])
        if name != "norm":
            expected = adam(own, is_factored=name != "kernel")
            np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_factored_second_moments_of_bfloat16_parameters_do_not_freeze():
    tx = ng.scale_by_adam_8bit(factored=True)
    g = jax.random.normal(jax.random.key(0), (2000, 16, 12)).astype(jnp.bfloat16)
    state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(g[0]), g)
    weights = 0.001 * 0.999 ** np.arange(2000)[::-1]
    for found, axis in ((state.codes.nu, -1), (state.scales.nu, -2)):
        means = np.mean(np.asarray(g, np.float64) ** 2, axis)
        # Each step of float32 errs by 6e-8, which decays within 1000 steps.
        np.testing.assert_allclose(found, np.tensordot(weights, means, 1), rtol=1e-4)


def test_momentum_in_8_bits_with_factored_second_moments():
    grads = gradients(200)
    (reference, _), (updates, state) = (
        updates_of(ng.scale_by_adam_8bit(min_size=size, factored=True), grads)
        for size in (10**6, 1)
    )
    assert state.codes.mu["w"].dtype == jnp.uint8
    assert state.codes.nu["w"].dtype == state.scales.nu["w"].dtype == jnp.float32
    assert relative(updates[-100:], reference[-100:]) < 0.06


def test_zero_gradients_have_zero_updates():
    zeros = [{"w": jnp.zeros(SHAPE), "nothing": jnp.zeros((0, 8))}] * 2
    updates, state = updates_of(ng.scale_by_adam_8bit(min_size=1, factored=True), zeros)
    assert not np.any(updates[-1]["w"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_projected_parameters_have_no_factored_second_moments():
    tx = ng.chain(ng.low_rank_project(rank=4), ng.scale_by_adam_8bit(factored=True))
    state = tx.init({"kernel": jnp.ones(SHAPE), "lm_head": jnp.ones(SHAPE)})
    shapes = jax.tree.map(jnp.shape, state[1].codes.nu)
    assert shapes == {"kernel": (96, 4), "lm_head": (96,)}


@pytest.mark.parametrize(
    "inner,in_8_bits",
    [
        (optax.trace(0.9), {"trace"}),
        (optax.scale_by_amsgrad(), {"mu", "nu", "nu_max"}),
        (optax.scale_by_rss(), {"sum_of_squares"}),
        (optax.scale_by_factored_rms(min_dim_size_to_factor=4), set()),
        (ng.woodbury_natural_gradient(history=2), set()),
        (optax.chain(optax.clip(1.0), optax.scale_by_lion()), {"mu"}),
    ],
)
def test_what_the_wrapper_stores_in_8_bits(inner, in_8_bits):
    grads = gradients(30, spread=0.3)
    updates, state = updates_of(ng.quantize_state(inner, min_size=100), grads)
    reference, _ = updates_of(inner, grads)
    named = jax.tree_util.tree_leaves_with_path(state.codes)
    fields = {
        [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)][-1]
        for path, x in named
        if x.dtype == jnp.uint8
    }
    assert fields == in_8_bits
    assert relative(updates[-1], reference[-1]) < (0.5 if "mu" in in_8_bits else 0.05)


def test_bfloat16_parameters_have_bfloat16_updates_of_float32_moments():
    grads = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), g) for g in gradients(100)]
    reference, _ = updates_of(optax.scale_by_adam(), [jax.tree.map(jnp.float32, g) for g in grads])
    for make in OPTIMIZERS.values():
        updates, _ = updates_of(make(), grads)
        assert updates[-1]["w"].dtype == jnp.bfloat16
        assert relative(jax.tree.map(jnp.float32, updates[-1]), reference[-1]) < 0.12


@pytest.mark.parametrize(
    "transition,side", [("rotate", "left"), ("rotate", "both"), ("reset", "right")]
)
def test_moments_follow_the_basis(transition, side):
    """A stack of layers, each refreshed at its own step; an SVD turns its basis every time."""
    rng = np.random.default_rng(1)
    A = rng.standard_normal((2, 72, 6)) * [9, 7, 5, 3, 2, 1]
    grads = [
        {"w": jnp.asarray(A @ rng.standard_normal((2, 6, 80)), jnp.float32)} for _ in range(24)
    ]

    def low_rank(adam, transition):
        return ng.chain(
            ng.low_rank_project(
                rank=6, update_interval=8, side=side, method="svd", transition=transition
            ),
            adam,
            ng.project_back(),
        )

    reference, _ = updates_of(low_rank(optax.scale_by_adam(), transition), grads)
    for make in OPTIMIZERS.values() if side == "left" else [ng.scale_by_adam_8bit]:
        updates, state = updates_of(low_rank(make(min_size=30), transition), grads)
        assert state[1].codes.mu["w"].dtype == jnp.uint8
        assert relative(updates, reference) < 0.1
    kept, _ = updates_of(low_rank(ng.scale_by_adam_8bit(min_size=30), "keep"), grads)
    assert relative(kept, reference) > 0.2


@pytest.mark.parametrize("spec", [jax.P("model", None), jax.P(None, "model")])
@pytest.mark.parametrize(
    "make,axis_type",
    [
        (ng.scale_by_adam_8bit, AxisType.Auto),
        (ng.scale_by_adam_8bit, AxisType.Explicit),
        (OPTIMIZERS["quantize_state"], AxisType.Explicit),
    ],
)
def test_sharded_arrays_have_the_codes_of_one_device(make, axis_type, spec):
    """Shards of 64 rows and blocks of 256; eight blocks to a device and none."""
    shapes = {"wide": (512, 576), "tall": (576, 512)}
    tx = make()
    grads = [
        {k: g["w"] for k, s in shapes.items() for g in [gradients(1, s, seed=t)[0]]} for t in (0, 1)
    ]
    plain = tx.init(grads[0])
    for g in grads:
        expected, plain = jax.jit(tx.update)(g, plain)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        grads = jax.device_put(grads, sharding)
        state = jax.jit(tx.init)(grads[0])
        update = jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state)
        text = update.lower(grads[1], state).compile().as_text()
    for name in shapes:
        assert updates[name].sharding.is_equivalent_to(sharding, 2)
        assert state.codes.mu[name].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        # A sum in another order can move a number over a threshold: by one code, and seldom.
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.mean(~np.isclose(a, b, rtol=1e-6)) < 1e-3
    # Bounds are exchanged, one number a block, and no array of the size of a parameter.
    for line in text.splitlines():
        if "= " in line and any(f" {op}(" in line for op in ("all-gather", "all-to-all")):
            size = np.prod([int(n) for n in line.split("[")[1].split("]")[0].split(",") if n])
            assert size <= 576 * 4, line


def test_a_restored_state_continues_bit_identically(tmp_path):
    tx, grads = ng.scale_by_adam_8bit(), gradients(8)
    update, state = jax.jit(tx.update), tx.init(grads[0])
    for g in grads[:4]:
        _, state = update(g, state)
    restored = through_orbax(state, state, tmp_path)
    for g in grads[4:]:
        (u, state), (w, restored) = update(g, state), update(g, restored)
    jax.tree.map(np.testing.assert_array_equal, (u, state), (w, restored))


def test_memory_report_counts_every_byte():
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    report = ng.memory_report(ng.galore_adamw(1e-2, rank=64, moment_bits=8), params)
    # Two moments of a byte, and a float32 for each block of 64.
    assert report.part_bytes["inner"] == 2 * (64 * 512 + 4 * 512)
    assert report.part_bytes["basis"] == 4 * 256 * 64
    state = jax.eval_shape(ng.galore_adamw(1e-2, rank=64, moment_bits=8).init, params)
    assert report.total_state_bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(state)
    )
    assert report.alternative_state_bytes["long"] == 12 + 4 * 512 * 64 + 2 * 256 * (64 + 4)


def test_moment_bits_of_the_factories():
    params = {"w": jnp.ones((128, 160))}
    for factory in (ng.galore_adamw, ng.natural_galore_adamw):
        state = factory(1e-2, rank=64, moment_bits=8).init(params)
        assert optax.tree.get(state, "codes").nu["w"].shape == (64, 160)
        with pytest.raises(ValueError, match="moment_bits must be None or 8, got 4"):
            factory(1e-2, moment_bits=4)
        assert "moment_bits" in ng.structural_args(factory)


def test_errors():
    with pytest.raises(ValueError, match="block_size must be at least 32, got 8"):
        ng.quantize_state(optax.scale_by_adam(), block_size=8)
    with pytest.raises(TypeError, match="min_size must be an integer"):
        ng.scale_by_adam_8bit(min_size=0.5)
    with pytest.raises(ValueError, match="registered type, got ScaleByLBFGSState"):
        ng.quantize_state(optax.lbfgs()).init({"w": jnp.ones(SHAPE)})
    for tx in (ng.quantize_state(optax.scale_by_adam()), ng.scale_by_adam_8bit()):
        with pytest.raises(ValueError, match=r"w: the update has shape \(64, 96\), but .*\(96, 64"):
            tx.update({"w": jnp.ones((64, 96))}, tx.init({"w": jnp.ones(SHAPE)}))
    with pytest.raises(TypeError, match=r"block/w: scale_by_adam_8bit takes real .* got complex64"):
        tx.init({"block": {"w": jnp.ones(SHAPE, jnp.complex64)}})
    tx, params = ng.quantize_state(optax.scale_by_adam()), {"b": jnp.ones(8), "w": jnp.ones(SHAPE)}
    with pytest.raises(ValueError, match=r"than the parameters at init.*only there: b"):
        tx.update({"w": params["w"]}, tx.init(params))


def test_random_keys_in_the_inner_state_are_left_alone():
    inner = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.trace(0.9))
    tx, params = ng.quantize_state(inner, min_size=1), {"w": jnp.ones((8, 64))}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert jnp.all(jnp.isfinite(updates["w"]))
