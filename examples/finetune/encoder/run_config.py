"""One typed configuration for a comparison of methods on a task."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from examples.common import compare
from examples.common.config import INT32, check_range
from examples.common.errors import ConfigError
from examples.finetune.encoder.data import TASKS
from examples.finetune.encoder.methods import MethodConfig, MethodName
from examples.finetune.encoder.protocols import PROTOCOLS

if TYPE_CHECKING:
    TaskName = ProtocolName = str
else:  # The names that the command line offers.
    TaskName, ProtocolName = Literal[tuple(TASKS)], Literal[tuple(PROTOCOLS)]


@dataclass(frozen=True)
class OutputConfig(compare.OutputConfig):
    """Output of a comparison. All of this may change when a run is resumed."""

    root: Path = Path("runs/glue")
    """Directory of all runs."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    save_model: bool = True
    """Write the fine-tuned model, as transformers reads it."""
    predict: bool = False
    """Write predictions for the test rows, in GLUE's files for submission: test.tsv, test.jsonl
    or test.csv in --data (mnli: test_matched, test_mismatched and, where it is there, diagnostic
    for AX), or the hub's. Labels are not needed."""


@dataclass(frozen=True)
class RunConfig:
    """Fine-tune a BERT or RoBERTa on sentences or pairs of sentences.

    Trains the model once with each of the methods and compares them. Writes runs/glue/NAME with
    summary.json, and for each method config.yaml, config.json, metrics.jsonl, summary.json, the
    model and checkpoints. Ctrl-C or SIGTERM saves and stops after the current batch (exit code 130
    or 143), a second one at once; --resume goes on from there. Errors end with exit code 1, wrong
    arguments with 2. --config FILE reads options from a file, such as config.yaml of a run.
    """

    preset: ProtocolName = "default"
    """A published protocol; every other option overrides a part of it."""
    task: TaskName = "movie-snippets"
    """A task of GLUE (all but wnli), or "own" and "own-regression" for files of yours."""
    data: Path | None = None
    """Directory with train and dev files: .tsv as GLUE publishes them, .jsonl or .csv with the
    columns of the data sets library (own: sentence1, sentence2, label). Without it GLUE is
    fetched."""
    methods: tuple[MethodName, ...] = ("adamw", "natural-galore")
    """Trained one after another."""
    model: str = "minilm"
    """A directory in the Hugging Face layout, a name on the hub, or minilm."""
    new_head: bool = False
    """Start from a random head, of a BERT with its pooler, although the model has one: one for
    classes of other names or of another number is refused."""
    epochs: int = 3
    """Passes over the rows."""
    batch_size: int = 32
    """Rows in a batch."""
    max_length: int = 128
    """Tokens in a row; longer rows lose their ends, and are counted."""
    limit: int | None = None
    """Train on so many rows only, drawn at random, the same for every seed."""
    eval_batches: int | None = None
    """Evaluate on so many batches of each split only, of rows drawn at random, the same for every
    seed."""
    sweep_learning_rates: tuple[float, ...] = ()
    """Train each method once with each of these peak rates, instead of that of the preset or the
    method's own, and take the best by the validation rows."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls to zero."""
    dropout: float | None = None
    """Instead of the model's own rates."""
    seed: int = 0
    """Of the head, the order of the rows, dropout, adapters and random subspaces."""
    method: tyro.conf.OmitArgPrefixes[MethodConfig] = field(default_factory=MethodConfig)
    output: tyro.conf.OmitArgPrefixes[OutputConfig] = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        compare.check(self, ("epochs", "batch_size", "limit", "eval_batches"))
        rates = self.sweep_learning_rates
        names = [f"{rate:g}" for rate in rates]  # Of directories.
        if len(set(names)) < len(names) or not all(0 < rate < math.inf for rate in rates):
            raise ConfigError(
                "sweep_learning_rates must be positive, finite and different in six digits, got "
                f"{' '.join(map(str, rates))}"
            )
        # The preset's rate is a default, which the sweep replaces.
        default = PROTOCOLS[self.preset](self.task).method.learning_rate
        if rates and self.method.learning_rate not in (None, default):
            raise ConfigError("give --learning-rate or --sweep-learning-rates, not both")
        # Two tokens begin and end a row, and RoBERTa has two more between sentences.
        check_range(self, f"[8, {INT32})", "max_length")
        check_range(self.output, f"[1, {INT32})", "log_every")
        check_range(self, "[0, 1]", "warmup")
        check_range(self, "[0, 1)", "dropout")

    @property
    def run_dir(self) -> Path:
        default = self.task if self.preset == "default" else f"{self.task}-{self.preset}"
        return self.output.root / (self.output.name or default)

    def identity(self) -> dict[str, Any]:
        """All fields that influence the result of one of the methods, as JSON values."""
        return compare.identity(self, "preset", "sweep_learning_rates")


def preset_config(preset: str, task: str) -> RunConfig:
    """The configuration of a preset for a task."""
    return RunConfig(preset=preset, task=task, **PROTOCOLS[preset](task)._asdict())
