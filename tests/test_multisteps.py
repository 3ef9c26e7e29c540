"""Gradient accumulation with optax.MultiSteps, around the chain and inside the subspace."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw

import natgalore_jax as ng

K = 2  # mini-steps of one accumulation
PARAMS = {"w": jnp.zeros((6, 8)), "v": jnp.zeros((8, 5)), "b": jnp.zeros(8)}


def project(interval=100, stagger=True, transition="rotate"):
    return ng.low_rank_project(
        rank=2, update_interval=interval, stagger=stagger, transition=transition
    )


def gradients(steps):
    key = jax.random.key(0)
    return [
        {
            name: jax.random.normal(jax.random.fold_in(key, 10 * t + i), w.shape)
            for i, (name, w) in enumerate(PARAMS.items())
        }
        for t in range(steps)
    ]


def run(tx, grads, params=PARAMS):
    """Updates and states after every step."""
    update, state, history = jax.jit(tx.update), tx.init(params), []
    for g in grads:
        updates, state = update(g, state, params)
        history.append((updates, state))
    return history


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected
    )


@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
def test_inside_equals_outside_while_the_basis_stays(inner):
    """The first basis: inside of the first mini-step, outside of the mean; here they are equal."""
    first, *others = gradients(6)
    grads = [first, first, *others]
    inside = run(ng.chain(project(), optax.MultiSteps(inner, K), ng.project_back()), grads)
    outside = run(optax.MultiSteps(ng.chain(project(), inner, ng.project_back()), K), grads)
    for t, ((u_in, _), (u_out, _)) in enumerate(zip(inside, outside, strict=True)):
        assert_close(u_in, u_out, rtol=1e-4)
        moved = [bool(jnp.any(u != 0)) for u in jax.tree.leaves(u_in)]
        assert all(moved) if t % K == K - 1 else not any(moved)


def test_accumulator_inside_is_low_rank():
    inside = ng.chain(project(), optax.MultiSteps(optax.adam(0.1), K), ng.project_back())
    outside = optax.MultiSteps(ng.chain(project(), optax.adam(0.1), ng.project_back()), K)
    shapes = [
        jax.tree.map(jnp.shape, optax.tree.get(tx.init(PARAMS), "acc_grads"))
        for tx in (inside, outside)
    ]
    assert shapes[0] == {"w": (2, 8), "v": (8, 2), "b": (8,)}
    assert shapes[1] == {"w": (6, 8), "v": (8, 5), "b": (8,)}


def test_woodbury_may_stand_inside_the_accumulation():
    """The history then holds accumulated gradients: one column for K mini-steps."""
    inner = optax.chain(ng.woodbury_natural_gradient(history=3, damping=0.1), optax.scale_by_adam())
    tx = ng.chain(project(interval=4), optax.MultiSteps(inner, K), ng.project_back())
    steps = run(tx, gradients(6))
    _, state = steps[-1]
    history = optax.tree.get(state, "history")
    assert history.columns["w"].shape == (3, 2, 8)
    assert history.columns["b"] == optax.MaskedNode()
    assert int(history.filled["w"]) == 3
    updates, _ = steps[-1]
    assert all(bool(jnp.isfinite(u).all() and (u != 0).any()) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("stagger", [False, True])
def test_bases_change_only_between_accumulations(stagger):
    tx = ng.chain(
        project(interval=6, stagger=stagger),
        optax.MultiSteps(optax.sgd(0.1), K),
        ng.project_back(),
    )
    changes = {"w": [], "v": []}
    last = None
    for t, (_, state) in enumerate(run(tx, gradients(14))):
        rows, cols = optax.tree.get(state, "basis")
        basis = {"w": rows["w"], "v": cols["v"]}
        for name in changes:
            if last is not None and bool(jnp.any(basis[name] != last[name])):
                changes[name].append(t)
        last = basis
    if stagger:  # slots 0, 1, 2 of an interval start at steps 0, 2, 4; two matrices share them
        assert changes == {"v": [6, 12], "w": [2, 8]}
    else:
        assert changes == {"v": [6, 12], "w": [6, 12]}


def test_interval_must_be_a_multiple_of_the_accumulation():
    accumulate = optax.MultiSteps(optax.adam(0.1), 3)
    with pytest.raises(ValueError, match=r"update_interval=100 must be a multiple of the 3 steps"):
        ng.chain(project(), accumulate, ng.project_back())
    with pytest.raises(ValueError, match="multiple of the 3 steps"):
        ng.chain(project(), accumulate.gradient_transformation(), ng.project_back())
    with pytest.raises(ValueError, match=r"online.*MultiSteps around the chain"):
        ng.chain(ng.low_rank_project(rank=2, method="online"), accumulate)
    ng.chain(project(interval=99), accumulate, ng.project_back())  # a multiple of three


def test_steps_cannot_be_skipped_inside():
    """A skipped step would move the refreshes into the accumulations."""
    for k, outcome in (
        (K, pytest.raises(ValueError, match="around the chain")),
        (1, nullcontext()),
    ):
        skipping = optax.MultiSteps(optax.sgd(0.1), k, should_skip_update_fn=optax.skip_not_finite)
        with outcome:
            ng.chain(project(), skipping, ng.project_back())


def test_outside_any_interval_will_do():
    """Around the chain, the chain counts accumulated steps."""
    tx = optax.MultiSteps(composed_adamw("stored", 0.1, rank=2, update_interval=3, history=2), K)
    _, state = run(tx, gradients(5))[-1]
    assert int(state.inner_opt_state[0].count) == 2


def test_multisteps_hidden_inside_another_transformation_is_an_error():
    hidden = optax.chain(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    tx = ng.chain(ng.low_rank_project(rank=2, update_interval=4), hidden)
    with pytest.raises(ValueError, match=r"must be an argument of natgalore_jax\.chain"):
        tx.init({"w": jnp.ones((6, 8))})


@pytest.mark.parametrize(
    "every_k",
    [
        lambda step: jnp.where(step < 10, 1, 2),
        lambda step: jnp.where(jnp.abs(step - 100) < 10, 4, 2),  # 2 at first and at last
        optax.piecewise_constant_schedule(2, {10: 2, 20: 0.5}),
    ],
)
def test_multisteps_with_a_schedule_is_an_error_inside(every_k):
    changing = optax.MultiSteps(optax.sgd(0.1), every_k)
    with pytest.raises(ValueError, match=r"constant number of steps.*around the chain"):
        ng.chain(ng.low_rank_project(rank=2, update_interval=4), changing)


@pytest.mark.parametrize("every_k", [lambda step: 2, lambda step: jnp.full([], 2)])
def test_multisteps_with_a_constant_schedule_is_a_constant_inside(every_k):
    def inside(steps):
        return ng.chain(project(), optax.MultiSteps(optax.sgd(0.1), steps), ng.project_back())

    grads = gradients(2 * K)
    for got, expected in zip(run(inside(every_k), grads), run(inside(2), grads), strict=True):
        assert_close(got[0], expected[0])
    with pytest.raises(ValueError, match="multiple of the 2 steps"):
        ng.chain(
            ng.low_rank_project(rank=2, update_interval=3), optax.MultiSteps(optax.sgd(1), every_k)
        )


@pytest.mark.parametrize("residual", ["fira", "fisher"])
def test_accumulation_inside_with_a_residual_is_an_error(residual):
    """It would be the residual of single micro-batches, and added before the step is taken."""
    right_way = r"MultiSteps around the whole chain.*low_rank_steps.*residual='none'"
    accumulate = optax.MultiSteps(optax.sgd(0.1), K)
    for inner in (accumulate, accumulate.gradient_transformation()):
        with pytest.raises(ValueError, match=right_way):
            ng.chain(project(), inner, ng.project_back(residual=residual))
        natural = ng.natural_galore(rank=2, update_interval=4, residual=residual)
        with pytest.raises(ValueError, match=right_way):
            ng.chain(natural, inner)
    hidden = ng.chain(
        project(), optax.chain(optax.apply_every(K), optax.sgd(0.1)), ng.project_back(1.0, residual)
    )
    with pytest.raises(ValueError, match=right_way):
        hidden.init(PARAMS)


@pytest.mark.parametrize("residual", ["fira", "fisher"])
def test_accumulation_around_with_a_residual_is_that_of_the_mean_gradient(residual):
    tx = ng.chain(project(), optax.sgd(0.1), ng.project_back(residual=residual))
    grads = gradients(2 * K)
    around = run(optax.MultiSteps(tx, K), grads)
    means = [
        jax.tree.map(lambda *g: sum(g) / K, *grads[i : i + K]) for i in range(0, len(grads), K)
    ]
    for i, (expected, _) in enumerate(run(tx, means)):
        assert_close(around[K * i + K - 1][0], expected, rtol=1e-4, atol=1e-5)
        assert not any(np.any(u) for u in jax.tree.leaves(around[K * i][0]))


@pytest.mark.parametrize("residual", ["none", "fisher"])
def test_one_step_is_no_accumulation(residual):
    alone, accumulated = (
        ng.chain(ng.low_rank_project(rank=2), inner, ng.project_back(residual=residual))
        for inner in (optax.scale_by_adam(), optax.MultiSteps(optax.scale_by_adam(), 1))
    )
    params = {"w": jnp.ones((6, 8))}
    G = [{"w": jax.random.normal(jax.random.key(t), (6, 8))} for t in range(3)]
    states = [tx.init(params) for tx in (alone, accumulated)]
    for g in G:
        a, states[0] = alone.update(g, states[0], params)
        b, states[1] = accumulated.update(g, states[1], params)
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6, atol=1e-7)
