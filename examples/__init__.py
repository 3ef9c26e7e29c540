"""Programs to copy and change."""

import os
import sys

if sys.argv[0] == "-m":  # Python is looking for the program, which is one of this package.
    from examples.common.interrupt import end_on_signals

    end_on_signals()
    # A program that was compiled before starts sooner. jax reads this when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(".cache", "jax"))
