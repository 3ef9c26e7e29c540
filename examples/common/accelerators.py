"""Devices that a program uses, and accelerators of the machine that it does not."""

import glob
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import jax

from examples.common.errors import ConfigError

TPU_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # As in the Makefile.


def find_devices() -> list[jax.Device]:
    """Devices of all processes, for which jax is started if it is not.

    Raises:
      ConfigError: if there is none, or none of a platform that JAX_PLATFORMS asks for.
    """
    asked = platforms_asked_for()
    try:
        return jax.devices()
    # An assertion, without a message, where only GPUs are asked for and none is visible.
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "none is visible"
        raise ConfigError(
            f"JAX_PLATFORMS={asked}: no such device ({reason}); {_devices_without(asked)}"
            if asked
            else f"jax finds no device: {reason}"
        ) from error


def platforms_asked_for() -> str:
    """As JAX_PLATFORMS or a program has set them, "" for jax's own choice."""
    return getattr(jax.config, "jax_platforms", None) or ""


def _devices_without(asked: str) -> str:
    """A sentence about the devices that jax finds if no platform is asked for."""
    if jax.distributed.is_initialized():  # The other processes would have to look with this one.
        return "without JAX_PLATFORMS jax takes what there is"
    jax.config.update("jax_platforms", "")
    try:
        return f"without JAX_PLATFORMS there is {_kinds(jax.devices())}"
    except RuntimeError:
        return "without JAX_PLATFORMS there is none either"
    finally:
        jax.config.update("jax_platforms", asked)


def _kinds(devices: Iterable[jax.Device]) -> str:
    kinds = Counter(device.device_kind for device in devices)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def announce_devices(note: Callable[[str], None] | None = None, used: int | None = None) -> None:
    """Note the devices of a program; warn on stderr about accelerators that are idle.

    Args:
      note: prints a line; None: on stderr, for programs whose output is a text or a path.
      used: how many devices of this process compute; None: all of them.

    Raises:
      ConfigError: if there is no device.
    """
    note = _to_stderr if note is None else note
    note(f"devices: {_kinds(find_devices())}")
    for warning in (unused_accelerator(), _idle_devices(used)):
        if warning is not None:
            _to_stderr(f"warning: {warning}")


def unused_accelerator() -> str | None:
    """A sentence, if jax computes on the processor of a machine with an accelerator.

    None if the user has asked for it with JAX_PLATFORMS.
    """
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    found, extra = ("GPU", "cuda") if _has_gpu() else ("TPU", "tpu")
    if extra == "tpu" and not any(glob.glob(pattern) for pattern in TPU_FILES):
        return None
    return (
        f"this machine has a {found}, and jax computes on the processor: "
        f"make DEVICE={extra} setup, or pip install '.[{extra}]' in a clone, installs a jax for it"
    )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _idle_devices(used: int | None) -> str | None:
    count = jax.local_device_count()
    if jax.default_backend() == "cpu" or used is None or used >= count:
        return None
    return f"{count - used} of {count} devices are idle: use them with --distributed.devices"


def _has_gpu() -> bool:
    """As in the Makefile: a GPU is listed, whatever became of others."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"^GPU \d", listed.stdout, re.M) is not None
