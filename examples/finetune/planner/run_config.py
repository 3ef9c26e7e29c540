"""One typed configuration for a comparison of methods on plans of tool calls."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from examples.common import compare
from examples.common.config import check_range
from examples.common.schedule import ScheduleConfig
from examples.finetune.planner.datasets import DATASETS
from examples.finetune.planner.methods import MethodConfig, MethodName
from examples.finetune.planner.prompts import PromptConfig

# Short prompts, and an epoch that two cores can train.
_SHORT: dict[str, Any] = {
    "methods": ("natural-galore",),
    "epochs": 1,
    "buckets": 2,
    "eval_limit": 48,
    "eval_batch_size": 16,
}
# "small" is `make functions`, one call a plan; the calls of "nested" take each other's results.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "small": _SHORT
    | {
        "dataset": "bfcl",
        "parts": ("simple_python", "multiple"),
        "batch_size": 4,
        "accumulate": 1,
        "max_length": 320,
        "limit": 240,
        "new_tokens": 80,
        "prompt": PromptConfig(examples=0, brief=True),
    },
    "nested": _SHORT
    | {
        "dataset": "nestful",
        "batch_size": 2,
        "accumulate": 2,
        "max_length": 640,
        "new_tokens": 256,
        "prompt": PromptConfig(examples=0, negatives=0, brief=True),
    },
}

if TYPE_CHECKING:
    DatasetName = PresetName = str
else:  # The names that the command line offers.
    DatasetName, PresetName = Literal[tuple(DATASETS)], Literal[tuple(PRESETS)]


@dataclass(frozen=True)
class OutputConfig(compare.OutputConfig):
    """Output of a comparison. All of this may change when a run is resumed."""

    root: Path = Path("runs/function_calling")
    """Directory of all runs."""
    shown: int = 20
    """Predictions in predictions.md; predictions.json has all of them."""
    side_by_side: int = 3
    """Test questions to print at the end, with the plans before and after training."""


@dataclass(frozen=True)
class RunConfig:
    """Fine-tune a LLaMA to answer questions with plans of tool calls.

    Trains the model once with each of the methods and compares them. Writes
    runs/function_calling/NAME with summary.json, curves.png and untrained.json, and for each method
    config.yaml, config.json, metrics.jsonl, summary.json, predictions.md, predictions.json, the
    model of its best epoch and checkpoints. Ctrl-C or SIGTERM saves and stops after the current
    step (exit code 130 or 143), a second one at once; --resume goes on from there. Errors end with
    exit code 1, wrong arguments with 2. --config FILE reads options from a file, such as
    config.yaml of a run; --bf16 is --dtype bfloat16.
    """

    preset: PresetName = "default"
    """"small" is `make functions`, "nested" as short a run on NESTFUL; every other option overrides
    a part of it."""
    dataset: DatasetName = "nestful"
    """Data set, of a package unless --data is given."""
    data: Path | None = None
    """Local files: the directory data_v1 of NESTFUL, bfcl_eval/data of BFCL, TinyAgent's JSON."""
    parts: tuple[str, ...] = ()
    """Only these parts of NESTFUL or categories of BFCL."""
    skip_unusable: bool = False
    """TinyAgent: leave out records that cannot be used, and count them."""
    held_out: float = 0.1
    """TinyAgent: at most this share of the records validates, and another one tests."""
    methods: tuple[MethodName, ...] = ("adamw", "natural-galore")
    """Trained one after another: adamw lora galore natural-galore and others."""
    model: str = "smollm2-135m-instruct"
    """A GGUF file, a directory in the Hugging Face layout, a name on the hub, or
    smollm2-135m-instruct, from a package."""
    epochs: int = 3
    """Passes over the rows."""
    batch_size: int = 4
    """Rows in a batch."""
    accumulate: int = 8
    """Batches in a step."""
    max_length: int = 2048
    """Tokens in a row, prompt and plan; longer rows are left out, and counted."""
    buckets: int = 4
    """To how many lengths rows are padded at most; programs are compiled for each of them."""
    limit: int | None = None
    """Train on so many rows only, drawn at random, the same for every seed."""
    eval_limit: int | None = None
    """Records of the validation and of the test split to evaluate on, drawn at random; by default
    all of them."""
    eval_batch_size: int = 8
    """Plans that are written at a time."""
    new_tokens: int = 512
    """The longest plan that the model may write, in tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products; weights are float32."""
    remat: bool = False
    """Recompute what is inside a layer in the backward pass, to save memory."""
    seed: int = 0
    """Of the order of the rows, of adapters and of random subspaces."""
    prompt: tyro.conf.OmitArgPrefixes[PromptConfig] = field(
        default_factory=lambda: PromptConfig(details=False)
    )
    schedule: tyro.conf.OmitArgPrefixes[ScheduleConfig] = field(default_factory=ScheduleConfig)
    method: tyro.conf.OmitArgPrefixes[MethodConfig] = field(default_factory=MethodConfig)
    output: tyro.conf.OmitArgPrefixes[OutputConfig] = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "accumulate", "buckets", "limit", "eval_limit")
        compare.check(self, (*names, "eval_batch_size", "new_tokens", "max_length"))
        check_range(self, "(0, 0.5)", "held_out")
        check_range(self.output, "[0, inf)", "shown", "side_by_side")

    @property
    def run_dir(self) -> Path:
        default = self.dataset if self.preset == "default" else f"{self.dataset}-{self.preset}"
        return self.output.root / (self.output.name or default)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulate

    def identity(self) -> dict[str, Any]:
        """All fields that influence the result of one of the methods, as JSON values."""
        return compare.identity(self, "preset")


def preset_config(preset: str) -> RunConfig:
    """The configuration of a preset."""
    return RunConfig(preset=preset, **PRESETS[preset])
