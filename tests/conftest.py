"""Settings that must be in the environment before jax starts, and fixtures of the programs."""

import os
from collections.abc import Iterator

import durations
import pytest
import tiers

pytest.register_assert_rewrite("command_lines")  # A failure says what was printed.

# XLA's CPU thread pool is as large as the machine; on two cores, several simulated devices that
# wait for each other inside batched linear algebra starve it and hang. NPROC enlarges the pool.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N parts, of equal time")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.name.startswith("test_") and item.path.stem not in tiers.FAST:
            item.add_marker("slow")
    if config.getoption("--shard"):
        number, of = map(int, config.getoption("--shard").split("/"))
        files = {item.nodeid.split("::")[0] for item in items}
        here = durations.shard(files, number, of)
        config.hook.pytest_deselected(
            items=[item for item in items if item.nodeid.split("::")[0] not in here]
        )
        items[:] = [item for item in items if item.nodeid.split("::")[0] in here]


@pytest.fixture(scope="session")
def fast_compile(tmp_path_factory) -> Iterator[None]:
    """Programs are compiled once, and quickly: these tests run many, each for a moment."""
    import jax  # Not before the settings above.

    # One cache for all workers and later runs, where `make test` has one.
    shared = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    directory = f"{shared}-fast" if shared else tmp_path_factory.mktemp("jax_cache")
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        # For the programs that tests start.
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())
