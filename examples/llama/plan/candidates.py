"""Candidates for a plan, as arguments of the program."""

import dataclasses
import functools
import inspect
import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from examples.common import cli
from examples.common.errors import ConfigError
from examples.common.optimizers import OPTIMIZERS
from examples.llama.__main__ import SHORTHANDS, parse
from examples.llama.model.config import ModelConfig
from examples.llama.run_config import RunConfig, run_preset
from examples.llama.weights.files import open_weights
from examples.llama.weights.initial import merge

# From the best to the least good by the losses of docs/quality.md; 8 bits cost nothing there.
PREFERRED = (
    "natural-galore",
    "natural-galore@moment_bits=8",
    "galore",
    "galore@moment_bits=8",
    "adamw",
    "adamw-8bit",
)
IN_SUBSPACE = ("--accumulate-in-subspace", "--residual=none")
# From the fastest to the slowest.
STEPS = {"ordinary": (), "remat": ("--model.remat",), "per layer": ("--per-layer",)}


@dataclass(frozen=True)
class PlanConfig:
    """Find settings of a run that fit into a device's memory, before anything is allocated.

    Takes all options of `python -m examples.llama` too; they hold for every setting. Weights and
    optimizer states are exact. The rest is what XLA's compiler reserves: docs/memory.md. Errors end
    with exit code 1, wrong arguments with 2; a plan in which nothing fits is no error.
    """

    device_memory: str | None = None
    """Memory of the device, such as 24GB (10⁹ bytes each) or 24GiB (2³⁰); by default that of the
    accelerator in this machine."""
    reserve: str = "500MB"
    """What the driver, the allocator and the libraries take of it."""
    optimizers: tuple[str, ...] = ()
    """NAME or NAME@OPTION=VALUE,...: names and options of the program, best first. By default
    --optimizer, or Natural GaLore, GaLore and AdamW, with moments in 8 bits too."""
    ranks: tuple[int, ...] = ()
    """By default the one of the run, and half of it."""
    batch_sizes: tuple[int, ...] = ()
    """Rows in a batch; by default --batch-size, or the most that fit. Without --accumulate, batches
    are accumulated to the rows of the preset's step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What matrix products are computed in."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What parameters are stored in; by default the same."""
    all: bool = False
    """Look at all settings: also at those that are worse than one that fits."""
    json: Path | None = None
    """Write the settings and their bytes to this file."""
    figure: Path | None = None
    """Draw the memory of the models of the GaLore papers, 60m to 7b, to this file (.png)."""

    def __post_init__(self) -> None:
        for name in ("ranks", "batch_sizes"):
            if any(value < 1 for value in getattr(self, name)):
                raise ConfigError(
                    f"{name} must be at least 1, got {' '.join(map(str, getattr(self, name)))}"
                )


class Candidate(NamedTuple):
    """A setting."""

    optimizer: str
    step: str  # one of `STEPS`
    arguments: tuple[str, ...]  # of the program
    config: RunConfig

    @property
    def rank(self) -> int | None:
        return self.config.optimizer.rank if has_rank(self.optimizer) else None

    @property
    def command(self) -> str:
        return shlex.join(("python", "-m", "examples.llama", *self.arguments))

    def with_rows(self, batch_size: int) -> "Candidate":
        """With another batch, and as many rows in a step."""
        rows = self.config.batch_size * self.config.accumulate
        arguments = list(self.arguments)
        for option, value in (("--batch-size", batch_size), ("--accumulate", rows // batch_size)):
            arguments[arguments.index(option) + 1] = str(value)
        return self._replace(arguments=tuple(arguments), config=_sized(parse(arguments)))


def candidates(plan: PlanConfig, given: Sequence[str]) -> Iterator[list[Candidate]]:
    """For each optimizer and batch size the settings, from the best to the least good.

    Args:
      plan: what to look at.
      given: arguments of the program.

    Raises:
      ConfigError: if there is no such optimizer, or a setting is none of the program's.
    """
    base, known = parse([*given]), _written_out(given)
    optimizers = plan.optimizers or _given(known, "--optimizer") or PREFERRED
    ranks = plan.ranks or (base.optimizer.rank, max(base.optimizer.rank // 2, 1))
    batch_sizes = plan.batch_sizes or _given(known, "--batch-size") or (1,)
    lengths = ("--seq-len", str(base.seq_len))
    dtypes = ("--model.dtype", plan.dtype, "--model.param-dtype", plan.param_dtype or plan.dtype)
    for spec in optimizers:
        for batch_size in batch_sizes:
            group, error = [], None
            for rank in sorted({*ranks}, reverse=True) if has_rank(spec) else (None,):
                for step, flags in _steps(spec, base, int(batch_size), known):
                    if (base.per_layer and "--per-layer" not in flags) or (
                        base.model.remat and step.startswith("ordinary")
                    ):
                        continue  # The user has asked for another one.
                    chosen = [*optimizer_arguments(spec, rank), *lengths]
                    chosen += ["--batch-size", str(batch_size)]
                    chosen += ["--accumulate", str(_accumulate(base, int(batch_size), known))]
                    chosen += dtypes
                    flags = [x for x in ("--model.stacked", *flags) if x not in given]
                    arguments = (*_without(given, chosen[::2]), *chosen, *flags)
                    try:
                        config = _sized(parse([*arguments]))
                    except ConfigError as e:  # Weights in 8 bits need --per-layer, for example.
                        error = error or e
                        continue
                    group.append(Candidate(spec, step, arguments, config))
            if not group and error is not None:
                raise error
            yield group


def free_batches(plan: PlanConfig, given: Sequence[str]) -> bool:
    """Whether the plan decides how many rows a batch has."""
    fixed = {"--batch-size", "--accumulate"} & {*_written_out(given)}
    return not plan.batch_sizes and not fixed


def _accumulate(base: RunConfig, batch_size: int, given: Sequence[str]) -> int:
    """Batches of a step: those that are given, or as many as keep the rows of the preset's step."""
    if "--accumulate" in given:
        return base.accumulate
    preset = run_preset(base.preset)
    return max(1, preset.batch_size * preset.accumulate // batch_size)


def _steps(
    spec: str, base: RunConfig, batch_size: int, given: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and arguments of `STEPS`: with whole gradients accumulated, then with low-rank ones."""
    name = spec.split("@")[0]
    parameters = inspect.signature(OPTIMIZERS[name].factory).parameters
    # "None" leaves it to the optimizer.
    chosen = _given([*given, *optimizer_arguments(spec, None)], "--residual")
    residuals = {*chosen, OPTIMIZERS[name].fixed.get("residual", "none")}
    possible = (
        _accumulate(base, batch_size, given) > 1
        and "residual" in parameters
        and residuals <= {"none", "None"}
    )
    for step, flags in STEPS.items():
        if not (base.accumulate_in_subspace and possible):
            yield step, flags
        if possible:
            yield f"{step}, low-rank sums", (*flags, *IN_SUBSPACE)


def has_rank(spec: str) -> bool:
    """Whether an optimizer has a subspace.

    Raises:
      ConfigError: if there is no such optimizer.
    """
    name = spec.split("@")[0]
    if name not in OPTIMIZERS:
        raise ConfigError(f"no optimizer is called {name!r}; there are {', '.join(OPTIMIZERS)}")
    return "rank" in inspect.signature(OPTIMIZERS[name].factory).parameters


def optimizer_arguments(spec: str, rank: int | None) -> list[str]:
    """Arguments of the program for NAME or NAME@OPTION=VALUE,...

    Raises:
      ConfigError: if it is neither.
    """
    name, _, options = spec.partition("@")
    arguments = ["--optimizer", name]
    if rank is not None:
        arguments += ["--rank", str(rank)]
    for option in options.split(",") if options else ():
        key, equals, value = option.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"an optimizer is NAME or NAME@OPTION=VALUE,..., got {spec!r}")
        arguments += [f"--{key.replace('_', '-')}", value]
    return arguments


def _written_out(given: Sequence[str]) -> list[str]:
    """Arguments with those of their --config FILE, names and values apart."""
    return apart(cli.expand(given, SHORTHANDS, RunConfig))


def apart(words: Sequence[str]) -> list[str]:
    """Arguments with `--name=value` as two words."""
    pairs = [word.split("=", 1) if word.startswith("--") else [word] for word in words]
    return [word for pair in pairs for word in pair]


def _given(arguments: Sequence[str], name: str) -> tuple[str, ...]:
    """The value of an option, if it is there; the last one counts."""
    found = [value for key, value in itertools.pairwise(arguments) if key == name]
    return tuple(found[-1:])


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Arguments without options that will be given anew, and their values."""
    before = [None, *arguments]
    pairs = zip(before, arguments, strict=False)
    return [word for previous, word in pairs if word not in names and previous not in names]


def _sized(config: RunConfig) -> RunConfig:
    """With the model of --init-from, or the vocabulary that the tokenizer will have, if known."""
    if config.offload != "none":
        raise ConfigError(f"a plan counts one device's memory: no --offload {config.offload}")
    if config.init_from is not None:
        return dataclasses.replace(config, model=merge(config, _model_of(config.init_from)))
    known = config.data.tokenizer is None
    return config.with_vocabulary(config.data.vocab_size) if known else config


@functools.cache
def _model_of(weights: str) -> ModelConfig:
    return open_weights(weights).config
