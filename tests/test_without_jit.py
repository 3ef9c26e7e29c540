"""Calls of update without jax.jit: what they compile."""

import jax
import jax.numpy as jnp
import optax
import pytest
from composed import composed_adamw
from contract import FACTORIES, random_like, zeros

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

COVERING = [
    "all parts",
    "online",
    "natural_galore_adamw",
    "compact_natural_gradient",
    "8 bits in a subspace",
    "quantize_state in a subspace",
    "8-bit Tucker bases, 4-bit history",
    "apollo_adamw",
    "ldadamw",
    "alice_adamw",
    "racs_adamw",
    "scale_sgd",
]


@pytest.fixture
def compilations():
    found = []
    # What other tests of this process have compiled would not be compiled here.
    jax.clear_caches()

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", COVERING)
def test_the_second_call_compiles_nothing(name, compilations, fast_compile):
    tx = FACTORIES[name]()
    dtype = jnp.bfloat16 if name == "all parts" else jnp.float32
    params, grads = random_like(zeros(dtype), 0), random_like(zeros(dtype), 1)
    _, state = tx.update(grads, tx.init(params), params)
    assert compilations  # it is what counts them
    compilations.clear()
    for _ in range(4):  # over a refresh
        _, state = tx.update(grads, state, params)
    assert not compilations


def test_the_second_optimizer_of_the_same_kind_compiles_nothing(compilations, fast_compile):
    """As under optax.inject_hyperparams, which makes one at every call."""
    params = {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}
    for rate in (0.1, 0.2):
        tx = composed_adamw("compact", rate, rank=2, decay=0.9 + rate / 10)
        compilations.clear()
        tx.update(params, tx.init(params), params)
    assert not compilations


def test_parts_of_an_update_compile_nothing_the_second_time(compilations, fast_compile):
    params = {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}
    tx = ng.galore_adamw(0.1, rank=2)
    steps, state = ng.training.low_rank_steps(tx), tx.init(params)
    mean = optax.tree.zeros_like(steps.project(params, state))
    for round in range(2):
        for position in range(2):
            state, mean = steps.accumulate(params, state, mean, position)
        _, state = steps.update(mean, state, params)
        if round == 0:
            compilations.clear()
    assert not compilations
