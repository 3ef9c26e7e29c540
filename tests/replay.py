"""Recorded gradients of a real transformer, and what a transformation makes of gradients."""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

_FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "galore_torch.npz"


@functools.cache
def recorded() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of galore_torch.npz (see make_galore_torch.py there) and its settings."""
    with np.load(_FIXTURE) as arrays:
        arrays = dict(arrays)
    return arrays, json.loads(str(arrays.pop("settings")))


def flax(x: np.ndarray) -> np.ndarray:
    """(…, out, in) of torch to (…, in, out), the shape of a Flax kernel."""
    return np.swapaxes(x, -1, -2)


def recorded_tree(loss_scale: float = 1.0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Initial values and (60, ...) gradients by name: Flax kernels, an embedding and a vector."""
    arrays, settings = recorded()
    names = settings["matrices"] + settings["vectors"]

    def oriented(kind: str, name: str) -> np.ndarray:
        x = arrays[f"{kind}/{name}"]
        return flax(x) if name in settings["matrices"] else x

    init = {name: oriented("init", name) for name in names}
    grads = {name: oriented("grads", name) * np.float32(loss_scale) for name in names}
    return init, grads


def replay(tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    """The parameters after every step, (steps, ...): the gradients do not depend on them."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @jax.jit
    def run(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return jax.tree.map(np.asarray, run(params, grads))


def updates_of(tx: optax.GradientTransformation, gradients: list[Any]) -> tuple[list[Any], Any]:
    """The updates of all steps, gradients standing for the parameters, and the last state."""
    state, update, out = tx.init(gradients[0]), jax.jit(tx.update), []
    for g in gradients:
        u, state = update(g, state, g)
        out.append(u)
    return out, state


def through_orbax(tree: Any, like: Any, directory: pathlib.Path) -> Any:
    """A tree saved and restored; `like` has its shapes and dtypes."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    with ocp.CheckpointManager(directory) as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        restored = manager.restore(0, args=ocp.args.StandardRestore(like))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    return restored
