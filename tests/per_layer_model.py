"""A small model of stacked layers, and the two routes that train it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tolerances import LOSSES

import natgalore_jax as ng

L, D, F, V, ROWS, TOKENS, STEPS = 3, 12, 20, 16, 4, 6, 20


def init_params(tied=False):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape, np.float32) / shape[-2] ** 0.5)

    params = {
        "embed": {"table": normal(V, D)},
        "layers": {
            "up": normal(L, D, F),
            "down": normal(L, F, D),
            "norm": {"scale": jnp.ones((L, D))},
        },
        "norm": {"scale": jnp.ones(D)},
    }
    return params if tied else params | {"head": {"kernel": normal(D, V)}}


def embed(params, batch):
    return params["embed"]["table"][batch["x"]]


def layer(params, x):
    return x + jnp.tanh((x * params["norm"]["scale"]) @ params["up"]) @ params["down"]


def head(params, x, batch):
    kernel = params["head"]["kernel"] if "head" in params else params["embed"]["table"].T
    logits = (x * params["norm"]["scale"]) @ kernel
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def loss(params, batch):
    x, _ = jax.lax.scan(lambda x, w: (layer(w, x), None), embed(params, batch), params["layers"])
    return head(params, x, batch)


def batches(steps=STEPS):
    tokens = np.random.default_rng(1).integers(0, V, (steps, ROWS, TOKENS + 1), np.int32)
    return [{"x": t[:, :-1], "y": (t[:, :-1] * 3 + t[:, 1:] // 8) % V} for t in tokens]


def ordinary(tx, params, batch_list):
    """Losses, norms, parameters and state of the ordinary step."""

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, optax.tree.norm(grads)

    state, losses, norms = tx.init(params), [], []
    for batch in batch_list:
        params, state, value, norm = step(params, state, batch)
        losses.append(float(value))
        norms.append(float(norm))
    return losses, norms, params, state


def per_layer(tx, params, batch_list, **settings):
    train = ng.training.per_layer(tx, embed, layer, head, **settings)
    params = jax.tree.map(jnp.copy, params)  # The step takes them over.
    state, losses, norms = train.init(params), [], []
    for batch in batch_list:
        params, state, metrics = train.step(params, state, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return losses, norms, params, state


def assert_same(actual, expected):
    losses, norms, params, state = actual
    np.testing.assert_allclose(losses, expected[0], **LOSSES)
    np.testing.assert_allclose(norms, expected[1], **LOSSES)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(expected[3])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        (params, state.opt_state),
        (expected[2], expected[3]),
    )


SCHEDULE = optax.linear_schedule(0.01, 0.001, STEPS)
LOW = {"learning_rate": SCHEDULE, "rank": 4, "update_interval": 4, "eps": 1e-3}
