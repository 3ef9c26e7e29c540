"""Programs to copy and change."""

import contextlib
import os
import signal
import sys


def end_at_once(*_: object) -> None:
    """Handle Ctrl-C during the imports of a program.

    Extension modules turn a KeyboardInterrupt into an ImportError, and callbacks of the garbage
    collector swallow it.
    """
    with contextlib.suppress(Exception):  # Such as of a write that this has interrupted.
        sys.stdout.flush()
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[0] == "-m":  # Python is looking for the program, which is one of this package.
    signal.signal(signal.SIGINT, end_at_once)
    # A program that was compiled before starts sooner. jax reads this when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(".cache", "jax"))
