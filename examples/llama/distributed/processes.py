"""Start and end of a run of several processes."""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import jax

from examples.common.accelerators import find_devices
from examples.common.errors import ConfigError

# A process that ends early waits this long for the first one, which still draws and writes.
_SHUTDOWN_SECONDS = 1800


@dataclass(frozen=True)
class DistributedConfig:
    """Training on several devices. All of this may change when a run is resumed."""

    devices: bool = False
    """Share each batch among all devices of this process; there are no other processes."""
    cluster: bool = False
    """One of several processes, which find one another as the cluster says: SLURM, Open MPI,
    Kubernetes, TPU pods. Batches are shared among all devices of all of them."""
    coordinator_address: str | None = None
    """One of several processes, where there is no cluster to ask: HOST:PORT of process 0."""
    num_processes: int | None = None
    """Number of processes; with the coordinator's address."""
    process_id: int | None = None
    """Number of this process, from 0; with the coordinator's address."""
    sharding: Literal["replicated", "full"] = "replicated"
    """Weights and optimizer state replicated, or sharded over all devices."""
    heartbeat_timeout: int = 30
    """Seconds without a sign of life after which a process counts as dead, and the others end."""

    def __post_init__(self) -> None:
        explicit = (self.coordinator_address, self.num_processes, self.process_id)
        given = [value is not None for value in explicit]
        if any(given) and not all(given):
            raise ConfigError(
                "--distributed.coordinator-address, --distributed.num-processes and "
                f"--distributed.process-id belong together, got {explicit}"
            )
        if self.devices + self.cluster + any(given) > 1:
            raise ConfigError(
                "use one of --distributed.devices, --distributed.cluster and "
                "--distributed.coordinator-address"
            )
        if all(given) and not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise ConfigError(
                "--distributed.process-id counts from 0 and must be below "
                f"--distributed.num-processes, got {self.process_id} of {self.num_processes}"
            )
        if self.sharding == "full" and not self.enabled:
            raise ConfigError(
                "--distributed.sharding full divides what is on several devices: use it with "
                "--distributed.devices, --distributed.cluster or --distributed.coordinator-address"
            )
        if self.heartbeat_timeout < 1:
            raise ConfigError(
                "--distributed.heartbeat-timeout must be at least 1 s, got "
                f"{self.heartbeat_timeout}"
            )

    @property
    def several_processes(self) -> bool:
        return self.cluster or self.coordinator_address is not None

    @property
    def enabled(self) -> bool:
        """Whether batches are shared among devices."""
        return self.devices or self.several_processes


def start(config: DistributedConfig) -> None:
    """Joins the other processes, if there are any; before anything uses a device.

    Raises:
      ConfigError: if no cluster is found, or the other processes or a device are not.
    """
    if config.several_processes:
        _join(config)
    find_devices()


def _join(config: DistributedConfig) -> None:
    # Its handler of SIGTERM would stand in the way of that of `interrupt`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            # Only --distributed.cluster asks the cluster.
            cluster_detection_method=None if config.cluster else "deactivate",
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        how = "--distributed.cluster" if config.cluster else config.coordinator_address
        raise ConfigError(f"{how}: cannot join the other processes: {error}") from error


def several_processes() -> bool:
    """Whether this process has joined others."""
    if not jax.distributed.is_initialized():
        return False
    try:
        return jax.process_count() > 1
    except (RuntimeError, AssertionError):  # It has no device; see `find_devices`.
        return True


def abort_peers(code: int) -> None:
    """Ends this process at once after an error, if it is one of several.

    They would wait for it: in the sum of a gradient, or in the end that all reach together. So
    they lose the connection, and end too.
    """
    if several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
