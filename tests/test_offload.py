"""State and weights in host memory: the same numbers, and everything stays where it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from per_layer_model import LOW, batches, embed, head, init_params, layer, loss, ordinary

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")
needs_host_memory = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="a CPU has no separate memory of the host before"
)

STEPS = 6  # one refresh after the first


def memories(tree):
    """The memory kind of every array of some size, and of every other."""
    large = {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.size >= 16}
    small = {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.size < 16}
    return large, small


def natural(**settings):
    return ng.natural_galore_adamw(**LOW, **settings)


@needs_host_memory
def test_the_numbers_are_those_without():
    expected = ordinary(natural(), init_params(), batches(STEPS))
    tx = ng.training.offload_state(natural(), min_size=16)
    losses, _, params, state = ordinary(tx, init_params(), batches(STEPS))
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    assert memories(state) == ({"pinned_host"}, {"device"})
    assert memories(params)[0] == {"device"}
    assert jax.tree.structure(state) == jax.tree.structure(expected[3])


@needs_host_memory
@pytest.mark.parametrize("what", ["state", "weights and state"])
def test_per_layer_fetches_one_layer_at_a_time(what):
    expected = ordinary(natural(), init_params(), batches(STEPS))
    train = ng.training.per_layer(
        ng.training.offload_state(natural(), min_size=16), embed, layer, head
    )
    params = init_params()
    if what != "state":
        params = ng.training.to_host(params, min_size=16)
    state, losses = train.init(params), []
    for batch in batches(STEPS):
        params, state, metrics = train.step(params, state, batch)
        losses.append(metrics.loss)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    assert memories(state) == ({"pinned_host"}, {"device"})
    assert memories(params)[0] == ({"device"} if what == "state" else {"pinned_host"})

    # What comes to the devices in the loop over the layers is a layer, never a whole stack.
    jaxpr = str(jax.make_jaxpr(train.step)(params, state, batches(1)[0]))
    moved = [line for line in jaxpr.splitlines() if "device_put" in line and "<host>" not in line]
    stacks = [
        f"[{','.join(map(str, w.shape))}]" for w in params["layers"].values() if hasattr(w, "shape")
    ]
    assert moved and not [line for line in moved for shape in stacks if f"f32{shape}" in line]


@needs_host_memory
def test_per_layer_takes_weights_in_8_bits_from_host_memory():
    """The same numbers: where a weight is does not change how it is rounded."""

    def run(params):
        train = ng.training.per_layer(natural(), embed, layer, head)
        state = train.init(params)
        for batch in batches(2):
            params, state, metrics = train.step(params, state, batch)
        return metrics.loss, params

    loss_there, params = run(
        ng.training.to_host(ng.training.quantize_weights(init_params()), min_size=16)
    )
    assert "pinned_host" in memories(params)[0]
    loss_here, expected = run(ng.training.quantize_weights(init_params()))
    np.testing.assert_allclose(loss_there, loss_here, rtol=1e-5)
    assert jax.tree.structure(params) == jax.tree.structure(expected)


@needs_host_memory
def test_sharded_state_stays_sharded():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones((8, 16)), jax.NamedSharding(mesh, jax.P("data")))}
        tx = ng.training.offload_state(optax.adam(0.1), min_size=16)
        state = jax.jit(tx.init)(params)
        updates, state = jax.jit(tx.update)(params, state, params)
    mu = state[0].mu["w"].sharding
    assert (mu.memory_kind, mu.spec) == ("pinned_host", jax.P("data", None))
    assert updates["w"].sharding.memory_kind == "device"


@needs_host_memory
def test_shardings_of_a_state_say_which_arrays_are_in_host_memory():
    """On automatic axes, where the types of arrays do not have their shardings."""
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    columns = jax.NamedSharding(mesh, jax.P(None, "x"))
    here = {"w": jax.random.normal(jax.random.key(0), (16, 24)), "b": jnp.ones(8)}
    on_mesh = jax.device_put(here, {"w": columns, "b": jax.NamedSharding(mesh, jax.P())})
    chain = ng.chain(ng.low_rank_project(rank=4), optax.trace(0.9), ng.project_back())
    offloaded = ng.training.offload_state(chain, min_size=16)
    for params in (here, on_mesh):
        state_at = ng.training.state_shardings(offloaded, params)
        state = jax.jit(offloaded.init, out_shardings=state_at)(params)
        assert memories(state) == ({"pinned_host"}, {"device"})

    expected, _ = jax.jit(offloaded.update)(on_mesh, state, on_mesh)
    explicit = ng.training.with_shardings(offloaded, on_mesh)
    updates, state = jax.jit(explicit.update)(on_mesh, explicit.init(on_mesh), on_mesh)
    assert memories(state) == ({"pinned_host"}, {"device"})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates, expected)


@needs_host_memory
def test_in_place_on_a_mesh_with_counts_on_one_device():
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    w = jax.device_put(jnp.ones((16, 24)), jax.NamedSharding(mesh, jax.P("x")))
    tx = ng.training.offload_state(optax.adam(0.1), min_size=16)

    @functools.partial(ng.training.in_place, number=2)
    def step(state, w):
        updates, state = tx.update(w, state, w)
        return state, optax.apply_updates(w, updates), jnp.sum(w)

    adam, *others = tx.init(w)
    state = (adam._replace(count=jnp.zeros([], jnp.int32)), *others)  # As of optax.adam alone.
    assert not isinstance(state[0].count.sharding, jax.NamedSharding)
    for t in range(2):
        state, w, total = step(state, w)
        # Adam's first steps are 0.1 long.
        np.testing.assert_allclose(total, 16 * 24 * (1 - 0.1 * t), rtol=1e-3)
    assert memories(state) == ({"pinned_host"}, {"device"})
    assert int(state[0].count) == 2
    with pytest.raises(ValueError, match="number must be at least 1"):
        ng.training.in_place(step, 0)


def test_in_place_keeps_the_shardings_of_a_state_on_automatic_axes():
    """XLA would shard the parameters like the moments."""
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    everywhere, rows = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("x")))
    w, tx = jax.device_put(jnp.ones((16, 24)), everywhere), optax.adam(0.1)
    state = jax.tree.map(lambda x: jax.device_put(x, rows) if x.ndim else x, tx.init(w))

    @functools.partial(ng.training.in_place, number=2)
    def step(w, state, factor):
        updates, state = tx.update(factor * w, state, w)
        return optax.apply_updates(w, updates), state, jnp.sum(w)

    for _ in range(2):
        w, state, _ = step(w, state, factor=2.0)
        assert (w.sharding, state[0].mu.sharding) == (everywhere, rows)


@needs_host_memory
@pytest.mark.parametrize("place", ["another device", "automatic axes"])
@pytest.mark.parametrize("make", [natural, lambda: optax.adam(0.1)])
def test_a_state_is_where_its_parameters_are(place, make):
    """A state that is made from shapes alone too."""
    if place == "another device":
        home = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    else:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("x",), axis_types=auto, devices=jax.devices()[:2])
        home = jax.NamedSharding(mesh, jax.P("x"))
    params = jax.device_put({"w": jnp.ones((16, 32))}, home)
    tx = ng.training.offload_state(make(), min_size=16)
    state = tx.init(params)
    assert {frozenset(x.devices()) for x in jax.tree.leaves(state)} == {frozenset(home.device_set)}

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state, jnp.sum(params["w"])

    jitted = ng.training.in_place(step, 2)
    for _ in range(2):
        params, state, _ = jitted(params, state)
    assert params["w"].sharding.is_equivalent_to(home, 2)
    assert memories(state) == ({"pinned_host"}, {"device"})


@needs_host_memory
def test_accumulated_and_restored(tmp_path):
    """``lax.cond`` around the update needs both branches in one memory."""
    params, tx = (
        init_params(),
        optax.MultiSteps(ng.training.offload_state(natural(), min_size=16), 2),
    )

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches(3):
        params, state = step(params, state, batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", like)
    assert memories(restored) == memories(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@needs_host_memory
def test_what_a_step_left_in_host_memory_is_brought_back():
    """The type of such an array says "device"."""
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    x = jax.jit(lambda x: x + 1, out_shardings=host)(jnp.ones(8))
    assert x.sharding.memory_kind == "pinned_host"
    assert ng.training.to_device(x).sharding.memory_kind == "device"


def test_min_size_is_checked():
    with pytest.raises(ValueError, match="min_size must be at least 1, got 0"):
        ng.training.offload_state(optax.adam(0.1), min_size=0)


def test_inside_a_subspace_the_place_for_it_is_named():
    tx = ng.chain(ng.low_rank_project(4), ng.training.offload_state(optax.adam(0.1), 16))
    with pytest.raises(ValueError, match="put it around the whole chain"):
        tx.init({"w": jnp.ones((12, 8))})


@needs_host_memory
def test_numbers_stay_and_other_leaves_are_named():
    tree = ng.training.to_host({"w": jnp.ones(16), "n": 3}, min_size=16)
    assert tree["w"].sharding.memory_kind == "pinned_host" and tree["n"] == 3
    with pytest.raises(TypeError, match=r"layer/name: .*got 'mlp' of type str"):
        ng.training.to_host({"layer": {"name": "mlp"}})


def test_before_a_cpu_has_host_memory_the_version_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    tx = ng.training.offload_state(optax.adam(0.1), min_size=1)
    with pytest.raises(NotImplementedError, match=r"need jax 0\.10\.2 or newer on a CPU"):
        tx.init({"w": jnp.ones(4)})
