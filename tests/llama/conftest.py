"""Fixtures of the tests of the training program."""

import os
from pathlib import Path

import jax
import pytest


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory) -> Path:
    """A compilation cache: many runs of one configuration are compiled once."""
    directory = tmp_path_factory.mktemp("jax_cache")
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        # For the programs that tests start.
        os.environ[name.upper()] = str(value)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())
