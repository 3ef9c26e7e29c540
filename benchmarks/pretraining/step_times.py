"""Seconds of a training step of each method: in turns in one process, on one machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.common.child import call
from benchmarks.common.environment import environment
from benchmarks.common.result_files import Json, read_results, write
from benchmarks.common.sweep import environment as runs_environment
from benchmarks.pretraining.methods import own_ratio
from benchmarks.pretraining.run_spec import ROOT, PresetName, Run, prepare
from examples.common.errors import ConfigError
from examples.llama.training.build import abstract_run, placed_state
from examples.llama.training.train_step import make_model
from examples.pretrained.json_file import read_json

Seconds = Mapping[str, Mapping[str, float]]  # of a step, by preset and method


@dataclass(frozen=True, kw_only=True)
class Times:
    """Time a training step of each method of a suite, in turns, and write ROOT/step_seconds.json.

    The runs of a suite are made on several days and machines: their own times are not compared.
    """

    preset: PresetName = "nano"
    """Model, batch, rank and interval; the times of other presets in the file stay."""
    suite: str = "main"
    """Suite whose methods are timed."""
    methods: tuple[str, ...] = ()
    """Methods, instead of those of the suite."""
    rounds: int = 15
    """Steps of each method after the first two; their median counts."""
    root: Path = ROOT
    """Directory of all results."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")


def file_of(root: Path) -> Path:
    return root / "step_seconds.json"


def read_times(root: Path) -> Seconds:
    """The times of all presets that were timed."""
    found = read_json(file_of(root)) if file_of(root).exists() else {}
    return {preset: times["seconds"] for preset, times in found.items()}


def time_steps(request: Times) -> Json:
    """Time, write and return what is known of a preset.

    Raises:
      ConfigError: if there is no method to time.
    """
    methods = request.methods or tuple(
        dict.fromkeys(
            record["method"]
            for record in read_results(request.root, request.suite)
            if record["preset"] == request.preset
        )
    )
    if not methods:
        raise ConfigError(f"suite {request.suite} has no runs of the preset {request.preset}")
    where = environment(seed=0)  # The load of the machine before the measurement.
    arguments = {"preset": request.preset, "methods": methods, "rounds": request.rounds}
    # With the memory settings that the runs of a sweep have.
    child = "benchmarks.pretraining.step_times:median_seconds"
    seconds = call(child, env=runs_environment(1), **arguments)
    made = {"environment": where, "rounds": request.rounds, "seconds": seconds}
    path = file_of(request.root)
    write({**(read_json(path) if path.exists() else {}), request.preset: made}, path)
    return made


def median_seconds(preset: str, methods: list[str], rounds: int) -> dict[str, float]:
    """Of a step of each method, in turns."""
    steps = {method: _stepper(preset, method) for method in methods}
    samples: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(2 + rounds):
        for method, step in steps.items():
            start = time.perf_counter()
            step()
            samples[method].append(time.perf_counter() - start)
    return {method: round(statistics.median(found[2:]), 5) for method, found in samples.items()}


def _stepper(preset: str, method: str) -> Callable[[], None]:
    """A compiled step of a method on random tokens; a call takes it."""
    rates = {"learning_rate": 1e-3, "ratio": own_ratio(method) or 4.0}
    prepared = prepare(Run(preset=preset, method=method, **rates))
    run = abstract_run(prepared.config, prepared.tx)
    model = prepared.config.model
    state = placed_state(prepared.config, run.optimization, make_model(model, 0)[1], {})
    rows = jax.random.randint(jax.random.key(1), run.rows.shape, 0, model.vocab_size, jnp.int32)
    compiled = run.compile()

    def take() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, rows))

    return take
