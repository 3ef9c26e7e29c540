"""Devices that train together, of one process or of several.

Each batch is sharded over them. Weights and optimizer state are replicated, or sharded too. What
`jax.jit` makes of that sums the gradients over the devices, and is the same step.
"""

import contextlib
import json
from contextlib import AbstractContextManager
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.train_state import Metrics, TrainState
from examples.llama.distributed.processes import DistributedConfig


class Devices:
    """One device of one process: nothing is to be shared."""

    leads = True
    """Whether this process writes metrics and files, and speaks."""
    replicated: jax.sharding.Sharding | None = None
    """Where the state is; None: on the default device."""

    def context(self) -> AbstractContextManager[Any]:
        """What steps and evaluations are run in."""
        return contextlib.nullcontext()

    def weights_at(self, shapes: Any) -> Any:
        """Where first weights are made; None: on the default device."""
        return None

    def state_at(self, shapes: TrainState, tx: optax.GradientTransformation) -> Any:
        """Where the state of these shapes is, the weights of `place` in it."""
        return self.replicated

    def place(self, tree: Any) -> Any:
        """Weights that every process has, where they are to be."""
        return tree

    def share(self, array: np.ndarray) -> Any:
        """An array of which each process has its block of rows, each row on one device."""
        return array

    def local(self, tree: Any) -> Any:
        """A state as arrays of this process alone."""
        return tree

    def step(self, step: Any, state_at: Any) -> Any:
        """A step for rows that are shared and a state that is where `state_at` says."""
        return step

    def agree(self, stop: bool, metrics: Metrics) -> bool:
        """Whether to stop, the same in every process: `metrics` are of this step."""
        return stop

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of each process."""
        return [value]

    def wait(self, where: str) -> None:
        """Until every process is there."""


class SharedDevices(Devices):
    """All devices of all processes, in one row."""

    def __init__(self, batch_size: int):
        devices = jax.devices()
        if batch_size % len(devices):
            raise ConfigError(
                f"batch_size={batch_size} must be a multiple of the number of devices, "
                f"{len(devices)} of {jax.process_count()} process(es)"
            )
        self.mesh = Mesh(np.array(devices), ("data",))
        self.replicated = NamedSharding(self.mesh, jax.P())
        self._rows = NamedSharding(self.mesh, jax.P("data"))
        self.leads = jax.process_index() == 0
        self._stop = False
        self._agreed: jax.Array | None = None

    def place(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.replicated, x, x.shape), tree
        )

    def share(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self._rows, array)

    def local(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def step(self, step: Any, state_at: Any) -> "_SharedStep":
        return _SharedStep(step, self, state_at)

    def flags(self) -> jax.Array:
        """Whether each process wants to stop, as a row for each of its devices."""
        return self.share(np.full(jax.local_device_count(), self._stop))

    def agree(self, stop: bool, metrics: Metrics) -> bool:
        # The wish goes along with the next batch, and is read a batch later still, when its step
        # is done: no process waits for another one.
        self._stop |= stop
        before, self._agreed = self._agreed, metrics.pop("stop")
        return before is not None and bool(before)

    def gather(self, value: Any) -> list[Any]:
        if jax.process_count() == 1:
            return [value]
        raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = cast(np.ndarray, multihost_utils.process_allgather(np.int32(len(raw))))
        padded = np.pad(raw, (0, int(sizes.max()) - len(raw)))
        rows = cast(np.ndarray, multihost_utils.process_allgather(padded))
        return [json.loads(r[:n].tobytes()) for r, n in zip(rows, sizes, strict=True)]

    def wait(self, where: str) -> None:
        multihost_utils.sync_global_devices(where)


class _SharedStep:
    """A step, and with it what every process has to say: see `Devices.agree`."""

    def __init__(self, step: Any, devices: SharedDevices, state_at: Any):
        def shared(state: TrainState, rows: jax.Array, flags: jax.Array):
            state, metrics = step(state, rows)
            # Never negative: only so that this sum comes after those of the gradients, in the same
            # order in every process. CPU collectives that overtake one another end the run.
            return state, {**metrics, "stop": (flags | (metrics["grad_norm"] < 0)).any()}

        # Where nothing says so, XLA may leave a part of the state on one device only.
        where = (state_at, devices.replicated)
        self._step = jax.jit(shared, donate_argnums=0, out_shardings=where)
        self._devices = devices

    def __call__(self, state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
        return self._step(state, rows, self._devices.flags())

    def lower(self, state: TrainState, rows: jax.Array) -> jax.stages.Lowered:
        return self._step.lower(state, rows, self._devices.flags())


class ShardedDevices(SharedDevices):
    """All devices of all processes, in one row over which everything is divided.

    The weights of one layer at a time are fetched for its forward and its backward pass: that is
    what `common.lora.by_rows` tells the compiler.
    """

    def context(self) -> AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh)

    def weights_at(self, shapes: Any) -> Any:
        # Layers, the first of three axes, stay whole: all devices work on the same one.
        return ng.training.longer_side_shardings(shapes, self.mesh)

    def state_at(self, shapes: TrainState, tx: optax.GradientTransformation) -> Any:
        places = self.weights_at(shapes)
        opt_state = ng.training.state_shardings(tx, shapes.params, places.params)
        return places._replace(opt_state=opt_state)

    def place(self, tree: Any) -> Any:
        return jax.tree.map(_placed, tree, self.weights_at(tree))

    def local(self, tree: Any) -> Any:
        """In host memory: no device need have room for all of it."""
        return jax.tree.map(_whole, tree)


def make_devices(config: DistributedConfig, batch_size: int) -> Devices:
    """The devices that `config` names.

    Raises:
      ConfigError: if `batch_size` rows cannot be shared evenly among them.
    """
    if not config.enabled:
        return Devices()
    return (ShardedDevices if config.sharding == "full" else SharedDevices)(batch_size)


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
