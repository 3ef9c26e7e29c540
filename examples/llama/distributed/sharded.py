"""Devices that each hold a part of the weights, of the optimizer's state and of a batch."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

import natgalore_jax as ng
from examples.common.train_state import TrainState
from examples.llama.distributed.devices import SharedTeam, Team
from examples.llama.distributed.processes import DistributedConfig


class ShardedTeam(SharedTeam):
    """All devices of all processes, in one row over which everything is divided.

    The weights of one layer at a time are fetched for its forward and its backward pass: that is
    what `common.lora.by_rows` tells the compiler.
    """

    def context(self) -> AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh)

    def weights_at(self, shapes: Any) -> Any:
        return jax.tree.map(lambda x: longer_side(self.mesh, x.shape), shapes)

    def state_at(self, shapes: TrainState, tx: optax.GradientTransformation) -> Any:
        places = self.weights_at(shapes)
        opt_state = ng.training.state_shardings(tx, shapes.params, places.params)
        return places._replace(opt_state=opt_state)

    def place(self, tree: Any) -> Any:
        return jax.tree.map(_placed, tree, self.weights_at(tree))

    def local(self, tree: Any) -> Any:
        """In the memory of the host: no device need have room for all of it."""
        return jax.tree.map(_whole, tree)


def make_team(config: DistributedConfig, batch_size: int) -> Team:
    """The devices that `config` names.

    Raises:
      ConfigError: if `batch_size` rows cannot be shared evenly among them.
    """
    if not config.enabled:
        return Team()
    return (ShardedTeam if config.sharding == "full" else SharedTeam)(batch_size)


def longer_side(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The longer side of every matrix over all devices, or the other one if only that divides.

    The longer one is a side of the low-rank gradient too, so that the optimizer exchanges bases
    alone. Layers, the first of three axes, are not divided: all devices work on the same one.
    """
    spec: list[str | None] = [None] * len(shape)
    for axis in sorted(range(len(shape))[-2:], key=lambda a: (shape[a], a), reverse=True):
        if shape[axis] % mesh.size == 0:
            (spec[axis],) = mesh.axis_names
            break
    return NamedSharding(mesh, jax.P(*spec))


def _placed(x: Any, where: NamedSharding) -> jax.Array:
    """An array that every process has, or one that is there already."""
    if isinstance(x, jax.Array) and x.sharding == where:
        return x
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])


def _whole(x: jax.Array) -> Any:
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
