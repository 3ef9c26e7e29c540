"""Per-layer updates give the ordinary step's numbers, in the ordinary step's state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from per_layer_model import (
    LOW,
    SCHEDULE,
    assert_same,
    batches,
    embed,
    head,
    init_params,
    layer,
    loss,
    ordinary,
    per_layer,
)
from tolerances import LOSSES

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")


def decayed(params):
    """The usual mask: it looks at the number of axes, which must be that of the stack."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def by_name(up, down, rest):
    """Several optimizers in one program: one for each matrix of the layers, one for the rest."""
    labels = {"up": "up", "down": "down", "norm": "rest"}
    return optax.partition(
        {"up": up, "down": down, "rest": rest},
        {"embed": "rest", "layers": labels, "norm": "rest", "head": "rest"},
    )


OPTIMIZERS = {
    # Cautious steps drop entries by their sign. With these bases no entry is as small as rounding.
    "default": lambda: ng.natural_galore_adamw(**LOW, weight_decay=0.1, mask=decayed, seed=1),
    # Moments of the stack have more than 256 numbers, those of a layer fewer.
    "lean": lambda: ng.lean_natural_galore_adamw(**LOW, weight_decay=0.1, mask=decayed),
    "history, random keys, 8 bits": lambda: by_name(
        composed_adamw(
            "stored", **LOW, history=4, side="both", basis_dtype="int4", history_dtype="int8"
        ),
        ng.galore_adamw(
            **LOW, side="right", method="gaussian", residual="fira", basis_dtype="int8"
        ),
        optax.chain(
            ng.scale_by_adam_8bit(min_size=1, eps=1e-3), optax.scale_by_learning_rate(SCHEDULE)
        ),
    ),
    "apollo, ldadam, adamw": lambda: by_name(
        ng.contrib.apollo_adamw(**LOW),
        ng.contrib.ldadamw(SCHEDULE, rank=4, eps=1e-3, error_feedback=True),
        optax.adamw(SCHEDULE, eps=1e-3, weight_decay=0.1, mask=decayed),
    ),
    "alice, racs, scale": lambda: by_name(
        ng.contrib.alice_adamw(**LOW),
        ng.contrib.racs_adamw(SCHEDULE),
        ng.contrib.scale_sgd(SCHEDULE, eps=1e-3),
    ),
    "all at once, injected, accumulated": lambda: optax.MultiSteps(
        optax.inject_hyperparams(ng.galore_adamw, static_args=ng.structural_args(ng.galore_adamw))(
            **LOW, side="left", stagger=False, moment_bits=8
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_numbers_as_the_ordinary_step_over_refreshes(name):
    tx, params = OPTIMIZERS[name](), init_params()
    assert_same(per_layer(tx, params, batches()), ordinary(tx, params, batches()))


def test_either_step_goes_on_from_the_others_state():
    tx, params, steps = OPTIMIZERS["default"](), init_params(), batches(9)
    *_, halfway, opt_state = ordinary(tx, params, steps[:5])
    train = ng.training.per_layer(tx, embed, layer, head)
    state = train.init(params)._replace(opt_state=opt_state)
    for batch in steps[5:]:
        halfway, state, _ = train.step(halfway, state, batch)
    *_, expected, _ = ordinary(tx, params, steps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), halfway, expected
    )


def test_micro_batches_are_accumulated_in_the_subspace():
    tx, params, micro = ng.galore_adamw(**LOW), init_params(), batches(12)
    losses, _, actual, state = per_layer(tx, params, micro, accumulate=3)
    assert state.opt_state.mean["layers"]["up"].shape == (3, 4, 20)

    steps, opt_state = ng.training.low_rank_steps(tx), tx.init(params)

    @jax.jit
    def step(params, opt_state, batches):
        values, grads = zip(*[jax.value_and_grad(loss)(params, b) for b in batches], strict=True)
        opt_state = steps.refresh(grads[0], opt_state)
        low = [steps.project(g, opt_state) for g in grads]
        mean = jax.tree.map(lambda *g: sum(g) / 3, *low)
        updates, opt_state = steps.update(mean, opt_state, params)
        return values, optax.apply_updates(params, updates), opt_state

    for start in range(0, 12, 3):
        values, params, opt_state = step(params, opt_state, micro[start : start + 3])
        np.testing.assert_allclose(losses[start : start + 3], values, **LOSSES)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        (actual, state.opt_state.opt_state),
        (params, opt_state),
    )


def test_a_learning_rate_of_another_dtype_when_micro_batches_are_accumulated():
    """Two equal micro-batches are one batch; updates of bfloat16 weights are then float32."""
    tx = ng.galore_adamw(jnp.float32(0.05), rank=4)
    params, (batch,) = optax.tree.cast(init_params(), jnp.bfloat16), batches(1)
    losses, _, actual, _ = per_layer(tx, params, [batch, batch, batch], accumulate=2)
    assert losses[0] == losses[1] > losses[2]
    *_, expected, _ = ordinary(tx, params, [batch])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.02
        ),
        actual,
        expected,
    )


@pytest.mark.parametrize(
    ("layers", "width", "min_size"),
    [(64, 80, 64), (7, 16, 8 * 16), (8, 16, 8 * 16)],
    ids=["blocks", "below", "above"],
)
def test_vectors_of_any_number_of_layers_have_moments_in_8_bits(layers, width, min_size):
    """Stacks of more than 63 vectors, and stacks whose size is near the smallest size of codes."""
    tx = optax.chain(ng.scale_by_adam_8bit(min_size=min_size), optax.scale(-0.1))
    params = {"head": jnp.ones(width), "layers": {"scale": jnp.ones((layers, width))}}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, width)), jnp.float32)

    def run_head(params, x, batch):
        return jnp.mean(x * params["head"])

    def run_layer(layer, x):
        return jnp.tanh(x * layer["scale"])

    def whole(params):
        y, _ = jax.lax.scan(lambda x, w: (run_layer(w, x), None), x, params["layers"])
        return run_head(params, y, None)

    train = ng.training.per_layer(tx, lambda params, batch: x, run_layer, run_head)
    updates, expected = tx.update(jax.grad(whole)(params), tx.init(params))
    expected_params = optax.apply_updates(params, updates)
    params, state, _ = train.step(params, train.init(params), None)
    for a, b in (params, expected_params), (state.opt_state, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), a, b)
