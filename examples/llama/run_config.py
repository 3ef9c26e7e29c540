"""One typed configuration for a training run, and the presets that fill it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from examples.common import config
from examples.common.errors import ConfigError as ConfigError
from examples.common.loggers import LoggerName
from examples.common.optimizers import (
    NANO_WIDTH,
    OptimizerConfig,
    default_learning_rate,
    default_unprojected_ratio,
    trained_rates,
)
from examples.common.run_directory import check_name
from examples.common.schedule import ScheduleConfig
from examples.llama.data import DataConfig, is_hub
from examples.llama.distributed.processes import DistributedConfig
from examples.llama.model.adapters import AdapterConfig
from examples.llama.model.config import MODEL_PRESETS, ModelConfig, PresetName
from examples.llama.training.faults import FaultConfig

_FROM_0, _COUNTS = f"[0, {config.INT32})", f"[1, {config.INT32})"


@dataclass(frozen=True)
class OutputConfig:
    """Output of a run. All of this may change when a run is resumed."""

    name: str | None = None
    """Directory under runs/; by default preset, optimizer and adapter."""
    resume: bool = False
    """Continue this run from its last checkpoint. --steps, --learning-rate, --warmup and --floor
    may differ from before, and of packed rows --batch-size with --accumulate if their product is
    the same and both --accumulate are above 1; the same text may be elsewhere. What shapes the
    model or the optimizer's state may not."""
    overwrite: bool = False
    """Delete an earlier run of the same name, once this one has started."""
    root: Path = Path("runs")
    """Directory of all runs."""
    log_every: int = 1
    """Steps between two lines of metrics."""
    eval_every: int = 100
    """Steps between two evaluations on the validation split."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 2
    """Number of last checkpoints to keep."""
    keep_best: int = 0
    """Number of further checkpoints to keep, by lowest validation loss. Only a checkpoint of a step
    with an evaluation has one, unless a stop interrupted that; see --eval-every, --save-every."""
    sample: str = "My fellow citizens,"
    """The text that the sample at the end continues."""
    log_to: tuple[LoggerName, ...] = ()
    """Show the metrics in TensorBoard or Weights & Biases too."""
    quiet: bool = False
    """Print the summary only."""


@dataclass(frozen=True)
class RunConfig:
    """Pre-train a LLaMA on text.

    Writes runs/NAME with config.yaml, config.json, metrics.jsonl, curves.png, sample.txt,
    summary.json, checkpoints and, at the end, the weights in the Hugging Face layout. Ctrl-C or
    SIGTERM saves and stops after the current batch (exit code 130 or 143), a second one at once;
    --resume goes on from there. Errors end with exit code 1, wrong arguments with 2. --config FILE
    reads options from a file, such as config.yaml of a run; --bf16 is --model.dtype bfloat16.
    """

    preset: PresetName = "nano"
    """Sizes of the model and of the run; every other option overrides a part of it."""
    init_from: str | None = None
    """Continue from trained weights: the directory of a run, a directory in the Hugging Face layout
    such as RUN/export, a GGUF file, a name on the hub, or `smollm2-135m-instruct`. Model and
    tokenizer are those of the weights."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 16
    """Rows in a batch."""
    seq_len: int = 128
    """Tokens in a row."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    accumulate_in_subspace: bool = False
    """Average low-rank gradients, in an accumulator as small as the optimizer's moments. The first
    batch of a step determines its basis. Needs an optimizer with a subspace, and --residual
    none."""
    per_layer: bool = False
    """Update each layer as soon as its gradient is computed, so that those of all layers never
    exist together. Needs --model.stacked. --clip-norm then clips by the norm of the step before."""
    weight_bits: Literal[8] | None = None
    """Store the matrices of the layers in 8 bits, decoded one layer at a time and rounded
    stochastically after each update. Needs --per-layer. An evaluation decodes all of them."""
    offload: Literal["none", "state", "weights"] = "none"
    """Kept in host memory between uses: the optimizer's state, with --per-layer
    fetched layer by layer; or the weights of the layers too, which needs --per-layer."""
    seed: int = 0
    """Of the initial weights, the order of the data and the optimizer's random subspaces."""
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    schedule: tyro.conf.OmitArgPrefixes[ScheduleConfig] = field(default_factory=ScheduleConfig)
    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    model: ModelConfig = MODEL_PRESETS["nano"]
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    faults: tyro.conf.OmitArgPrefixes[FaultConfig] = field(default_factory=FaultConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output: tyro.conf.OmitArgPrefixes[OutputConfig] = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        config.check_range(self, _COUNTS, "steps", "batch_size", "seq_len", "accumulate")
        config.check_range(self, _FROM_0, "seed")
        config.check_range(self.output, _COUNTS, "log_every", "eval_every", "save_every", "keep")
        config.check_range(self.output, _FROM_0, "keep_best")
        check_name(self.output.name)
        if self.accumulate_in_subspace and self.optimizer.clip_norm is not None:
            raise ConfigError(
                f"clip_norm={self.optimizer.clip_norm} needs the whole gradient, which is never "
                "there with --accumulate-in-subspace: use one of the two"
            )
        if self.per_layer:
            self._check_per_layer()
        if self.weight_bits is not None:
            self._check_weight_bits()
        self._check_offload()
        if self.output.resume and self.output.overwrite:
            raise ConfigError("a run is either resumed or overwritten: --resume, --overwrite")
        # Published weights come with sizes and a max_length of their own.
        if self.init_from is None and self.seq_len > self.model.max_length:
            raise ConfigError(
                f"seq_len={self.seq_len} is longer than the model's max_length="
                f"{self.model.max_length}"
            )
        if self.init_from is None:
            check_adapter(self.adapter, self.model)
        elif self.adapter.kind == "factorised":
            raise ConfigError(
                "--init-from: weights of low rank cannot start from published ones: use "
                "--adapter.kind none, lora or relora"
            )

    def _check_per_layer(self) -> None:
        if self.faults.skip_nonfinite:
            raise ConfigError(
                "--skip-nonfinite: with --per-layer the first layers are updated before the last "
                "gradient is known: use --rollback-on-spike"
            )
        if not self.model.stacked:
            raise ConfigError("--per-layer takes the layers from a stack: use --model.stacked")
        if self.adapter.kind != "none":
            raise ConfigError(
                f"--per-layer has no part for frozen weights and adapters, got {self.adapter.kind}"
            )
        if self.accumulate > 1 and self.optimizer.clip_norm is not None:
            raise ConfigError(
                f"clip_norm={self.optimizer.clip_norm}: with --per-layer each batch would be "
                f"clipped, and not the mean of accumulate={self.accumulate}: use one of the two"
            )

    def _check_weight_bits(self) -> None:
        if not self.per_layer:
            raise ConfigError("--weight-bits decodes one layer at a time, which needs --per-layer")
        if self.offload == "weights":
            raise ConfigError(
                "--weight-bits keeps weights on the device: use --offload state, or none of the two"
            )
        if self.distributed.sharding == "full":
            raise ConfigError(
                "--weight-bits makes first weights whole on one device: use it with "
                "--distributed.sharding replicated"
            )

    def _check_offload(self) -> None:
        if self.offload != "none" and self.distributed.enabled:
            raise ConfigError(
                f"--offload {self.offload} keeps arrays of one device in its host's memory, not "
                "those that --distributed shares: use one of the two"
            )
        if self.offload == "weights" and not self.per_layer:
            raise ConfigError(
                "--offload weights fetches one layer at a time, which needs --per-layer"
            )
        if self.offload != "none" and self.accumulate_in_subspace:
            raise ConfigError(
                f"--offload {self.offload} hides the subspace that --accumulate-in-subspace takes "
                "gradients to: use one of the two"
            )

    @property
    def learning_rate(self) -> float:
        """Peak learning rate: the one given, or the optimizer's own, less for trained weights."""
        given = self.optimizer.learning_rate
        if given is not None:
            return given
        if self.init_from is not None:
            return trained_rates(self.optimizer.name, self.adapter.kind)[0]
        return default_learning_rate(self.optimizer.name, self._trained_width)

    @property
    def unprojected_ratio(self) -> float | None:
        """Ratio of the two rates: the one given, or the optimizer's own."""
        given = self.optimizer.unprojected_ratio
        if given is not None:
            return given
        if self.init_from is not None:
            return trained_rates(self.optimizer.name, self.adapter.kind)[1]
        return default_unprojected_ratio(self.optimizer.name, self._trained_width)

    @property
    def _trained_width(self) -> int:
        """The width that default rates follow: adapters were not measured."""
        return self.model.hidden if self.adapter.kind == "none" else NANO_WIDTH

    @property
    def run_dir(self) -> Path:
        adapter = "" if self.adapter.kind == "none" else f"-{self.adapter.kind}"
        name = self.output.name or f"{self.preset}-{self.optimizer.name}{adapter}"
        return self.output.root / name

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len * self.accumulate

    def with_vocabulary(self, size: int) -> "RunConfig":
        """With a model for that many tokens: the model follows the tokenizer."""
        if self.init_from is not None:  # Published weights may have rows to spare.
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=size))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return config.plain(dataclasses.asdict(self))


def check_adapter(adapter: AdapterConfig, model: ModelConfig) -> None:
    """Raise a ConfigError for an adapter of more ranks than a matrix of the layers has."""
    if adapter.kind != "none" and adapter.rank > model.smallest_side:
        raise ConfigError(
            f"adapter.rank={adapter.rank} is larger than the smallest side of a layer's "
            f"matrices, {model.smallest_side}"
        )


def _paper(steps: int, rank: int) -> dict[str, Any]:
    """The sizes of the GaLore papers: 512 rows of 256 tokens a step. Their runs, with data, rates
    and baselines, are in `examples/papers`."""
    optimizer = OptimizerConfig(rank=rank)
    return {"steps": steps, "batch_size": 512, "seq_len": 256, "optimizer": optimizer}


# What has no influence on the trained model, so that a resumed run may have it otherwise.
# The text itself is compared, whatever was left out of it.
HARMLESS = ("output.", "distributed.", "faults.", "data.cache_dir", "data.skip_bad_lines")

# What has an influence, but neither on the shapes of the state nor on its meaning.
OF_STEPS_LEFT = ("schedule.", "optimizer.learning_rate")
ADJUSTABLE = ("steps", *OF_STEPS_LEFT)
_BATCHES = ("batch_size", "accumulate")
_SOURCES = ("data.data", "data.tokenizer")

RUN_PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"steps": 600, "batch_size": 16, "optimizer": OptimizerConfig(rank=32)},
    "9m": {
        "steps": 2000,
        "batch_size": 64,
        "seq_len": 256,
        "optimizer": OptimizerConfig(rank=64),
    },
    "60m": _paper(10_000, rank=128),
    "130m": _paper(20_000, rank=256),
    "350m": _paper(60_000, rank=256),
    "1b": _paper(100_000, rank=512),
    "7b": _paper(150_000, rank=1024),
    "smollm2-135m": _paper(20_000, rank=192),
}


def run_preset(name: str) -> RunConfig:
    """The configuration of a whole run of the preset `name`."""
    model = MODEL_PRESETS[name]
    data = DataConfig(vocab_size=model.vocab_size)
    return RunConfig(preset=name, model=model, data=data, **RUN_PRESETS[name])


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields that a resumed run may not have otherwise, as "field: old -> new"."""
    harmless = (*HARMLESS, *ADJUSTABLE)
    changed = config.differences(old, new, defaults=RunConfig().to_dict(), harmless=harmless)
    may = (_BATCHES if _same_steps(old, new) else ()) + (_SOURCES if _same_text(old, new) else ())
    return [text for text in changed if text.split(":")[0] not in may]


def adjustments(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields that differ, influence the trained model and may, as "field: old -> new"."""
    changed = config.differences(old, new, defaults=RunConfig().to_dict(), harmless=HARMLESS)
    return [text for text in changed if text not in differences(old, new)]


def _same_text(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether text and tokenizer are equal wherever they are; a stream is not all read."""
    is_stream = is_hub(DataConfig(data=tuple(new["data"]["data"])))
    return old.get("text") == new.get("text") and not is_stream


def _same_steps(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two configurations divide the same rows into batches, for states of one structure.

    Without an accumulation the optimizer's state has no sum of gradients. ReLoRA's restarts of the
    learning rate count batches. A step is the mean of its batches, and batches of documents have
    different numbers of tokens.
    """
    rows, numbers = (
        [x.get("batch_size", 1) * x.get("accumulate", 1) for x in (old, new)],
        [x.get("accumulate", 1) for x in (old, new)],
    )
    one_structure = min(numbers) > 1 or new["accumulate_in_subspace"]
    counts_batches = new["adapter"]["kind"] == "relora" or new["data"]["rows"] == "documents"
    return rows[0] == rows[1] and one_structure and not counts_batches
