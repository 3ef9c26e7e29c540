"""Every optimizer of Optax inside a subspace, and states whose types are not registered."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from contract import OPTAX_OPTIMIZERS, signature
from replay import updates_of

import natgalore_jax as ng
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.states.entries import SecondMoment, registered_entries
from natgalore_jax._src.states.transport import find_basis_states, put_back

pytestmark = pytest.mark.usefixtures("fast_compile")

ROWS, COLS, RANK, STEPS, INTERVAL = 8, 10, 3, 13, 4
RNG = np.random.default_rng(0)
TARGET = jnp.asarray(RNG.standard_normal((ROWS, COLS)), jnp.float32)
CURVATURE = jnp.asarray(np.logspace(0, -1, ROWS)[:, None] / ROWS, jnp.float32)
NOISE = jnp.asarray(0.02 * RNG.standard_normal((STEPS, ROWS, COLS)), jnp.float32)
PARAMS = {"b": jnp.ones(6), "w": jnp.full((ROWS, COLS), 0.1)}
PLAN = LeafPlan("w", (ROWS, COLS), (), ((0,), (1,)), (RANK, None))

every_transition = pytest.mark.parametrize("transition", ["rotate", "reset", "keep"])


def loss_of(params):
    miss = params["w"] - TARGET
    return jnp.sum(CURVATURE * miss * miss) + jnp.mean(jnp.square(params["b"] - 2.0))


def inside(inner, transition="rotate", **kw):
    return ng.chain(
        ng.low_rank_project(
            rank=RANK,
            update_interval=INTERVAL,
            method="svd",
            stagger=False,
            transition=transition,
            **kw,
        ),
        inner,
        ng.project_back(),
    )


def lowest_second_moment(state):
    """The least entry of the second moments, or of ν − μ² if they are centred."""
    lowest = [jnp.zeros([])]
    for meaning, fields in registered_entries(state, jax.tree.structure(PARAMS)):
        for name, role in meaning.roles.items():
            for leaf, entry in enumerate(fields[name]):
                if isinstance(role, SecondMoment):
                    lowest += [jnp.min(x) for x in jax.tree.leaves(entry)]
                if isinstance(role, SecondMoment) and role.mean:
                    lowest.append(jnp.min(entry - jnp.square(fields[role.mean][leaf])))
    return jnp.min(jnp.stack(lowest))


def all_finite(tree):
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def train(tx):
    """The loss at the end, and after each step whether all is finite, and the least ν."""

    def step(carry, noise):
        params, state = carry
        value, grads = jax.value_and_grad(loss_of)(params)
        grads = {**grads, "w": grads["w"] + noise}
        # obj_fn is Sophia's, of low-rank parameters.
        updates, state = tx.update(
            grads, state, params, value=value, obj_fn=lambda p: optax.tree.norm(p, squared=True)
        )
        checks = all_finite((updates, state)), lowest_second_moment(state)
        return (optax.apply_updates(params, updates), state), checks

    # It runs 13 small steps: the compiler's time is the test's.
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, NOISE), compiler_options=fast)
    (params, _), (finite, lowest) = run((PARAMS, tx.init(PARAMS)))
    return float(loss_of(params)), np.asarray(finite), np.asarray(lowest)


@pytest.mark.parametrize("name", OPTAX_OPTIMIZERS)
def test_every_optimizer_of_optax_survives_three_refreshes(name):
    """Refreshes after steps 4, 8 and 12 turn the basis of a noisy quadratic's gradient."""
    start = float(loss_of(PARAMS))
    fall = {}
    for transition in ("rotate", "reset", "keep"):
        end, finite, lowest = train(inside(OPTAX_OPTIMIZERS[name](), transition))
        assert finite.all(), (transition, finite)
        # The rounding errors of Optax's own average of squares beside its square of an average.
        assert (lowest >= -1e-6).all(), (transition, lowest)
        fall[transition] = start - end
    for transition in ("rotate", "reset"):
        assert fall[transition] > min(0.5 * fall["keep"], 2.0 * fall["keep"]) - 0.02, fall


# Arrays in coordinates of the subspace that nothing can be said of in other coordinates: step
# sizes, bets, an estimate of the Hessian, and parameters.
KEPT = {
    ("ScaleByRpropState", "step_sizes"),
    ("SophiaState", "nu"),
    ("ProdigyState", "params0"),
    ("DoGState", "init_params"),
    ("DoWGState", "init_params"),
    ("MechanicState", "x0"),
    ("ScheduleFreeState", "z"),
    *(("MadgradState", field) for field in ("grad_sum_sq", "s", "x0")),
    *(
        ("COCOBState", field)
        for field in ("init_particles", "cumulative_gradients", "scale", "subgradients", "reward")
    ),
}


def fields_with_matrices(state):
    """The type and the field of each array with the shape of the low-rank gradient."""
    found = set()
    if hasattr(state, "_fields"):
        for name in state._fields:
            own = getattr(state, name)
            if isinstance(own, dict) and getattr(own.get("w"), "shape", None) == (RANK, COLS):
                found.add((type(state).__name__, name))
    if isinstance(state, (tuple, dict)):
        for child in state.values() if isinstance(state, dict) else state:
            found |= fields_with_matrices(child)
    return found


def test_the_table_has_every_state_of_optax():
    """A new optimizer of Optax fails here until somebody has decided what its state means."""
    low_rank = {"b": jnp.ones(6), "w": jnp.ones((RANK, COLS))}
    found = set()
    for make in OPTAX_OPTIMIZERS.values():
        state = jax.eval_shape(make().init, low_rank)
        found |= fields_with_matrices(state)
        registered = registered_entries(state, jax.tree.structure(low_rank))
        names = {name for meaning, _ in registered for name in meaning.roles}
        for type_name, field in fields_with_matrices(state):
            assert (field in names) != ((type_name, field) in KEPT), (type_name, field)
    assert found >= KEPT


def transported(state, C, transition="rotate", plan=PLAN):
    """An inner state after a change of the basis by C, without an optimizer around it."""
    structure = jax.tree.structure({"b": 0, "w": 0})
    basis_states, skeleton = find_basis_states(state, structure, [None, plan])
    moved = [
        {numbers: own.moved(transition, {0: C}) for numbers, own in of_leaf.items()}
        for of_leaf in basis_states
    ]
    return put_back(skeleton, moved)


def change(seed=0, overlap=0.7):
    """``P'ᵀP`` of two bases that share a part of their space."""
    P = np.linalg.qr(np.random.default_rng(seed).standard_normal((ROWS, RANK)))[0]
    Q = overlap * P + (1 - overlap) * np.random.default_rng(seed + 1).standard_normal(P.shape)
    return jnp.asarray(np.linalg.qr(Q)[0].T @ P, jnp.float32)


def tree_of(seed, positive=False):
    rng = np.random.default_rng(seed)
    x = {"b": rng.standard_normal(6), "w": rng.standard_normal((RANK, COLS))}
    return jax.tree.map(lambda x: jnp.asarray(x * x if positive else x, jnp.float32), x)


def linear(C, M):
    return np.asarray(C, np.float64) @ M


def squares(C, V):
    W = np.asarray(C, np.float64) ** 2
    return W @ V + (1 - W.sum(1, keepdims=True)) * V.mean(0)


ADAN = optax.ScaleByAdanState(
    m=tree_of(0), v=tree_of(1), n=tree_of(2, True), g=tree_of(3), t=jnp.array(5)
)


def test_signed_averages_rotate_and_squares_do_not_become_negative():
    """Adan's v is signed and its n is a square: other optimizers use the names the other way."""
    C = change()
    new = transported((optax.EmptyState(), ADAN), C)[1]
    for field, rule in (("m", linear), ("v", linear), ("g", linear), ("n", squares)):
        old = np.asarray(getattr(ADAN, field)["w"], np.float64)
        np.testing.assert_allclose(getattr(new, field)["w"], rule(C, old), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(getattr(new, field)["b"], getattr(ADAN, field)["b"])
    assert (np.asarray(new.n["w"]) > 0).all() and new.t == 5

    reset = transported(ADAN, C, "reset")
    assert not np.any(reset.m["w"]) and not np.any(reset.n["w"])
    np.testing.assert_allclose(reset.g["w"], new.g["w"])  # a previous gradient is no average


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_centred_moments_stay_above_the_square_of_the_mean(dtype):
    """Gradients that hardly change have a variance near zero: where C turns, ν alone falls short.

    Both the plain rule for ν, and ν rounded to less than μ², would give the root of a negative
    number.
    """
    mean = jax.tree.map(lambda x: x.astype(dtype), tree_of(0))
    spread = tree_of(1, True)
    for size in (1e-9, 0.1):
        nu = jax.tree.map(
            lambda m, s, size=size: (
                (jnp.square(m.astype(jnp.float32)) + size * s) * (1 + 2 * jnp.finfo(dtype).eps)
            ).astype(dtype),
            mean,
            spread,
        )
        state = type(optax.scale_by_stddev().init({}))(mu=mean, nu=nu)
        C = change(overlap=0.99)
        new = transported(state, C)
        mu, nu_new = (np.asarray(x["w"], np.float64) for x in (new.mu, new.nu))
        assert (nu_new >= mu**2).all()
        old_mu, old_nu = (np.asarray(x["w"], np.float64) for x in (mean, nu))
        if size < 0.1:
            assert (squares(C, old_nu) < linear(C, old_mu) ** 2).any()
        W = np.asarray(C, np.float64) ** 2
        kappa = (old_nu / old_mu**2).min()
        expected = kappa * linear(C, old_mu) ** 2 + W @ (old_nu - kappa * old_mu**2)
        expected += (1 - W.sum(1, keepdims=True)) * old_nu.mean(0)
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        # Both terms of a difference, ν − μ², are rounded.
        np.testing.assert_allclose(nu_new, expected, rtol=tolerance, atol=1e-6 * expected.max())


def test_centred_moments_with_bias_correction_have_no_negative_variance():
    """Equal gradients g: μ = (1 − βᵗ) g and ν = (1 − βᵗ) g², so that ν̂ = μ̂² in any basis."""
    g, correction = tree_of(0), 1 - 0.9**3
    state = optax.rmsprop(0.1, centered=True, bias_correction=True).init(g)[0]
    state = state._replace(
        mu=jax.tree.map(lambda x: correction * x, g),
        nu=jax.tree.map(lambda x: correction * x * x, g),
    )
    new = transported(state, change(overlap=1.0) @ jnp.asarray(rotation(RANK), jnp.float32))
    mean, square = (np.asarray(x["w"], np.float64) / correction for x in (new.mu, new.nu))
    np.testing.assert_allclose(square, mean**2, rtol=1e-4, atol=1e-6)


def rotation(n):
    return np.linalg.qr(np.random.default_rng(9).standard_normal((n, n)))[0]


def test_sm3_rotates_the_statistics_of_the_projected_axis():
    C, R = change(), tree_of(0)
    sm3 = optax.scale_by_sm3()
    _, state = sm3.update(R, sm3.init(R))
    new = transported(state, C)
    rows, cols = state.mu["w"]
    np.testing.assert_allclose(
        new.mu["w"][0], squares(C, np.asarray(rows)[:, None])[:, 0], rtol=1e-5
    )
    np.testing.assert_array_equal(new.mu["w"][1], cols)
    np.testing.assert_allclose(new.nu["w"], linear(C, np.asarray(state.nu["w"])), rtol=1e-4)


class Odd(typing.NamedTuple):
    """The names that this library and Optax use, with meanings of their own."""

    mu: typing.Any
    nu: typing.Any
    fisher: typing.Any
    scales: typing.Any
    codes: typing.Any
    columns: typing.Any
    gram: typing.Any
    history: typing.Any


def odd_optimizer():
    def init(params):
        return Odd(*(optax.tree.full_like(params, i) for i in range(len(Odd._fields))))

    return optax.GradientTransformation(init, lambda u, s, p=None: (u, s))


@every_transition
def test_a_state_of_an_unknown_type_is_kept_whatever_its_names(transition):
    tx = inside(odd_optimizer(), transition)
    before = tx.init(PARAMS)
    after, update = before, jax.jit(tx.update)
    for t in range(INTERVAL + 1):
        _, after = update({**PARAMS, "w": NOISE[t]}, after, PARAMS)
    assert signature(before) == signature(after)
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


class Mine(typing.NamedTuple):
    average: typing.Any
    squares: typing.Any
    steps: typing.Any


class Child(Mine):
    pass


def test_a_registered_state_is_found_in_any_wrapper():
    ng.register_state(Mine, average=ng.FirstMoment(), squares=ng.SecondMoment())
    C = change()
    inner = Child(tree_of(0), tree_of(1, True), tree_of(2))
    expected = linear(C, np.asarray(inner.average["w"], np.float64))
    hole = optax.MaskedNode()
    masked = Mine(*({"b": hole, "w": x["w"]} for x in inner))
    for state, find in (
        (inner, lambda s: s),
        (optax.MaskedState(masked), lambda s: s.inner_state),
        (optax.PartitionState({"a": optax.MaskedState(masked)}), lambda s: s[0]["a"].inner_state),
        (
            optax.InjectHyperparamsState(jnp.array(0), {"w": jnp.ones(())}, inner),
            lambda s: s.inner_state,
        ),
        (
            optax.MultiStepsState(jnp.array(0), jnp.array(0), (inner,), tree_of(3), ()),
            lambda s: s.inner_opt_state[0],
        ),
        ({"a": [inner, None]}, lambda s: s["a"][0]),
    ):
        new = find(transported(state, C))
        np.testing.assert_allclose(new.average["w"], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(new.steps["w"], inner.steps["w"])
        assert (np.asarray(new.squares["w"]) > 0).all()
        assert not np.any(find(transported(state, C, "reset")).average["w"])


def test_a_mask_may_leave_out_a_branch():
    """``optax.masked`` with a prefix of the parameters' tree."""
    params = {"a": {"u": jnp.ones((ROWS, COLS))}, "b": {"w": jnp.ones((ROWS, COLS))}}
    tx = optax.masked(inside(optax.masked(optax.trace(0.9), {"a": False, "b": True})), True)
    _, state = tx.update(params, tx.init(params), params)
    trace = state.inner_state[1].inner_state.trace
    assert trace["a"] == optax.MaskedNode() and trace["b"]["w"].shape == (RANK, COLS)


def test_registration_is_checked():
    with pytest.raises(TypeError, match="state_type must be a type"):
        ng.register_state(Mine(1, 2, 3), average=ng.FirstMoment())
    with pytest.raises(TypeError, match="average must be a FirstMoment or a SecondMoment"):
        ng.register_state(Mine, average="first")
    with pytest.raises(ValueError, match=r"Mine has the fields \['average'.*got 'mu'"):
        ng.register_state(Mine, mu=ng.FirstMoment())
    with pytest.raises(ValueError, match="the mean of squares must be a FirstMoment"):
        ng.register_state(Mine, squares=ng.SecondMoment(mean="average"))


def test_eight_bits_follow_the_same_table():
    """Signed codes for Adan's signed v, unsigned ones for its n, floats where nothing is known."""
    params = {"w": jnp.ones((8, 128))}
    state = ng.quantize_state(optax.scale_by_adan(), min_size=1).init(params)
    assert all(getattr(state.codes, f)["w"].dtype == jnp.uint8 for f in "mvng")
    centred = ng.quantize_state(optax.rmsprop(0.1, centered=True, momentum=0.9), min_size=1)
    state = centred.init(params)
    assert state.codes[0].nu["w"].dtype == jnp.float32  # a rounded ν could be less than μ²
    assert optax.tree.get(state.codes, "trace")["w"].dtype == jnp.uint8
    weights = ng.quantize_state(optax.contrib.schedule_free_sgd(0.1), min_size=1)
    with pytest.raises(ValueError, match="registered type, got ScheduleFreeState"):
        weights.init(params)


def test_adan_in_eight_bits_stays_near_adan():
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((64, 96))
    grads = [
        {"w": jnp.asarray(mean + 0.3 * rng.standard_normal(mean.shape), jnp.float32)}
        for _ in range(40)
    ]
    updates = [
        np.asarray(updates_of(tx, grads)[0][-1]["w"])
        for tx in (optax.scale_by_adan(), ng.quantize_state(optax.scale_by_adan()))
    ]
    error = np.linalg.norm(updates[1] - updates[0]) / np.linalg.norm(updates[0])
    assert error < 0.1  # codes without a sign for v: 0.5


def test_a_state_of_python_numbers_and_random_keys():
    """Its shapes are read at init, where its leaves need not be arrays."""
    inner = optax.GradientTransformation(
        lambda params: {"number": 0, "key": jax.random.key(0)},
        lambda updates, state, params=None: (updates, state | {"number": state["number"] + 1}),
    )
    tx = ng.chain(ng.low_rank_project(2), inner, ng.project_back())
    params = {"w": jnp.ones((8, 12))}
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert int(optax.tree.get(state, "number")) == 1
