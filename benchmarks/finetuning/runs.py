"""One run: what it is, its file, and how it is made."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.common import result_files
from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.result_files import Json, write
from examples.common.errors import ConfigError
from examples.common.methods import is_low_rank
from examples.finetune.encoder.baseline import baseline_scores
from examples.finetune.encoder.loop import train
from examples.finetune.encoder.methods import MethodName
from examples.finetune.encoder.prepare import prepare
from examples.finetune.encoder.run_config import RunConfig, TaskName, preset_config


@dataclass(frozen=True, kw_only=True)
class Common:
    """Settings of all runs of a sweep."""

    task: TaskName = "movie-snippets"
    """The task; those of GLUE need --data or a hub."""
    data: Path | None = None
    """Its files, as in examples.finetune.encoder."""
    model: str = "minilm"
    """The model, as in examples.finetune.encoder."""
    epochs: int | None = None
    """Passes over the rows; by default as in examples.finetune.encoder."""
    limit: int | None = None
    """Train on so many rows only."""
    embeddings: Literal["frozen", "projected", "full"] = "projected"
    """Of galore and natural-galore, as in examples.finetune.encoder."""
    moment_bits: Literal[8] | None = 8
    """Of galore and natural-galore, as in examples.finetune.encoder."""
    suite: str = "main"
    """Directory of runs that belong together."""
    root: Path = RESULTS / "glue"
    """Directory of all suites."""


@dataclass(frozen=True, kw_only=True)
class Run(Common):
    """Make one run and write its file."""

    method: MethodName = "natural-galore"
    """The method that trains the model."""
    rank: int = 8
    """Of adapters and subspaces; 0 for adamw, which has none."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    seed: int = 1
    """Of everything random."""
    workers: int = 1
    """Runs at a time, for the record."""

    def __post_init__(self) -> None:
        if (self.rank == 0) != (self.method == "adamw"):
            raise ConfigError(f"rank is 0 for adamw only, got {self.rank} for {self.method}")

    @property
    def label(self) -> str:
        return self.method if self.rank == 0 else f"{self.method}, rank {self.rank}"

    @property
    def path(self) -> Path:
        name = self.label.replace(", rank ", "-r")
        file = f"{name}-lr{self.learning_rate:g}-seed{self.seed}.json"
        return self.root / self.suite / self.task / file

    def config(self) -> RunConfig:
        """The configuration of the program."""
        config = preset_config("default", self.task)
        # AdamW and LoRA ignore both; their runs are the same whatever is asked of the others.
        embeddings, bits = (
            (self.embeddings, self.moment_bits) if is_low_rank(self.method) else ("frozen", None)
        )
        method = replace(
            config.method,
            learning_rate=self.learning_rate,
            embeddings=embeddings,
            moment_bits=bits,
        )
        return replace(
            config,
            data=self.data,
            model=self.model,
            methods=(self.method,),
            epochs=config.epochs if self.epochs is None else self.epochs,
            limit=self.limit,
            seed=self.seed,
            method=method if self.rank == 0 else replace(method, rank=self.rank),
        )


def is_done(run: Run) -> bool:
    """Whether the run was made already.

    Raises:
      ConfigError: if it was made with another configuration.
    """
    return result_files.is_done(run.path, run.config().identity())


def make(run: Run) -> Json | None:
    """Train, write the file and return its content; None if it was there already."""
    start = time.perf_counter()
    if is_done(run):
        return None
    config = run.config()
    prepared = prepare(config)
    result = train(config, run.method, prepared)
    record = {
        "suite": run.suite,
        "task": run.task,
        "method": run.method,
        "rank": run.rank,
        "label": run.label,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "environment": environment(run.seed),
        "workers": run.workers,
        "configuration": config.identity(),
        "rows": {name: len(part.tokens) for name, part in prepared.encoded.items()},
        "metric": prepared.task.metrics[0],
        "validation": prepared.task.validation[0],
        "records": result.records,
        **result.summary(),
        "baseline": baseline_scores(prepared.task, prepared.rows),
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    write(record, run.path)
    return record
