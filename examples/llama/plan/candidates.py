"""Candidates for a plan, as arguments of the program."""

import dataclasses
import functools
import inspect
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

    Takes all options of `python -m examples.llama` too; they hold for every setting, and what they
    leave open is chosen. Weights and optimizer states are exact. The rest is what XLA's compiler
    reserves: docs/memory.md. Errors end with exit code 1, wrong arguments with 2; a plan in which
    nothing fits is no error.
    """

    device_memory: str | None = None
    """Memory of the device, such as 24GB (10⁹ bytes each) or 24GiB (2³⁰); by default that of the
    accelerator in this machine."""
    reserve: str = "500MB"
    """Memory reserved for driver, allocator and libraries."""
    optimizers: tuple[str, ...] = ()
    """NAME or NAME@OPTION=VALUE,...: names and options of the program, best first. By default
    --optimizer, or Natural GaLore, GaLore and AdamW, with moments in 8 bits too."""
    ranks: tuple[int, ...] = ()
    """By default --rank, or the preset's, and half of it."""
    batch_sizes: tuple[int, ...] = ()
    """Rows in a batch; by default --batch-size, or the most that fit. Without --accumulate, batches
    are accumulated to the rows of the preset's step, with it a step has at most as many."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products; by default --model.dtype, or bfloat16."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of parameters; by default --model.param-dtype, or with --model.dtype (--bf16)
    what the program takes, or the same as --dtype."""
    all: bool = False
    """Look at all settings: also at those that are worse than one that fits."""
    json: Path | None = None
    """Write the settings and their bytes to this file."""
    figure: Path | None = None
    """Draw the memory of the models of the GaLore papers, 60m to 7b, to this file (.png, .pdf or
    .svg)."""

    def __post_init__(self) -> None:
        for name in ("ranks", "batch_sizes"):
            if any(value < 1 for value in getattr(self, name)):
                raise ConfigError(
                    f"{name} must be at least 1, got {' '.join(map(str, getattr(self, name)))}"
                )
        for name in ("json", "figure"):
            path = getattr(self, name)
            if path is not None and path.is_dir():
                raise ConfigError(f"{name} must be a file, got the directory {path}")
        if self.figure is not None and self.figure.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise ConfigError(f"figure must end in .png, .pdf or .svg, got {self.figure}")


# Options of the plan, and those of the program that say the same.
_SAME = {
    "optimizers": ("--optimizer",),
    "ranks": ("--rank",),
    "batch_sizes": ("--batch-size",),
    "dtype": ("--model.dtype", *SHORTHANDS),
    "param_dtype": ("--model.param-dtype",),
}


class Batches(NamedTuple):
    """Division of the rows of a step."""

    batch_size: int
    accumulate: int


class Candidate(NamedTuple):
    """A setting."""

    optimizer: str
    step: str  # one of `STEPS`
    arguments: tuple[str, ...]  # of the program
    config: RunConfig
    larger: tuple[Batches, ...] = ()  # that may be taken instead, from the smallest to the largest

    @property
    def rank(self) -> int | None:
        return self.config.optimizer.rank if has_rank(self.optimizer) else None

    @property
    def command(self) -> str:
        return cli.command("examples.llama", *self.arguments)

    def with_batches(self, batches: Batches) -> "Candidate":
        """With larger batches."""
        arguments = list(self.arguments)
        for option, value in zip(("--batch-size", "--accumulate"), batches, strict=True):
            arguments[arguments.index(option) + 1] = str(value)
        return self._replace(arguments=tuple(arguments), config=_sized(parse(arguments)))


def candidates(plan: PlanConfig, given: Sequence[str]) -> Iterator[list[Candidate]]:
    """For each optimizer and batch size the settings, from the best to the least good.

    What is given is kept, what is not is chosen. Without a batch size the settings have the
    smallest one, and all larger ones beside it.

    Args:
      plan: what to look at.
      given: arguments of the program.

    Raises:
      ConfigError: if there is no such optimizer, a setting is none of the program's, or two options
        say the same.
    """
    _check_given_once(plan, given)
    known = _written_out(given)
    stacked = ("--model.stacked",) if _flag(known, "model.stacked") is None else ()
    base = parse([*given, *stacked, *_needed(known)])
    ranks = plan.ranks or (base.optimizer.rank,)
    if not plan.ranks and "--rank" not in known:
        ranks = (*ranks, max(base.optimizer.rank // 2, 1))
    lengths = ("--seq-len", str(base.seq_len))
    dtypes = _dtypes(plan, base, known)
    for spec in plan.optimizers or cli.values_of(known, "--optimizer")[-1:] or _preferred(known):
        for (batch_size, accumulate), *larger in _batches(plan, base, known):
            group, error = [], None
            for rank in sorted({*ranks}, reverse=True) if _takes_rank(spec) else (None,):
                for step, flags in _steps(spec, accumulate, known):
                    chosen = [*optimizer_arguments(spec, rank), *lengths]
                    chosen += ["--batch-size", str(batch_size), "--accumulate", str(accumulate)]
                    chosen += dtypes
                    flags = [x for x in (*stacked, *flags) if x not in known]
                    arguments = (*_without(given, chosen[::2]), *chosen, *flags)
                    try:
                        config = _sized(parse([*arguments]))
                    except ConfigError as e:  # Weights in 8 bits need --per-layer, for example.
                        error = error or e
                        continue
                    group.append(Candidate(spec, step, arguments, config, (*larger,)))
            if not group and error is not None:
                raise error
            yield group


def step_rows(config: RunConfig) -> int:
    """Rows of all batches of a step."""
    return config.batch_size * config.accumulate


def _check_given_once(plan: PlanConfig, given: Sequence[str]) -> None:
    for name, options in _SAME.items():
        both = [option for option in options if option in given]
        if getattr(plan, name) and both:
            raise ConfigError(f"--{name.replace('_', '-')} and {both[0]}: give one of the two")


def _preferred(given: Sequence[str]) -> list[str]:
    """`PREFERRED` without those that set an option which is given."""
    return [spec for spec in PREFERRED if not {*optimizer_arguments(spec, None)[2::2]} & {*given}]


def _needed(given: Sequence[str]) -> tuple[str, ...]:
    """Options that given ones require, unless the user decided on them."""
    free = _flag(given, "per-layer") is None
    return ("--per-layer",) if free and cli.values_of(given, "--weight-bits")[-1:] == ("8",) else ()


def _dtypes(plan: PlanConfig, base: RunConfig, given: Sequence[str]) -> tuple[str, ...]:
    model, products = base.model, "--model.dtype" in given
    dtype = plan.dtype or (model.dtype if products else "bfloat16")
    stored = plan.param_dtype
    if stored is None and base.init_from is not None and "--model.param-dtype" not in given:
        # Rates of further training are so small that most bfloat16 weights would not move.
        stored = "float32"
    elif stored is None:
        stored = model.param_dtype if products or "--model.param-dtype" in given else dtype
    return ("--model.dtype", dtype, "--model.param-dtype", stored)


def _batches(plan: PlanConfig, base: RunConfig, given: Sequence[str]) -> list[list[Batches]]:
    """For each batch size the batches of a step, and larger ones if the plan decides.

    A step has the rows of the preset's, or if --accumulate is given at most as many.

    Raises:
      ConfigError: if a batch size divides no such step, and --accumulate is not given.
    """
    rows = step_rows(run_preset(base.preset))
    accumulate = base.accumulate if "--accumulate" in given else None
    sizes = plan.batch_sizes or ((base.batch_size,) if "--batch-size" in given else ())
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    if accumulate is not None:
        free = [Batches(size, accumulate) for size in range(1, max(rows // accumulate, 1) + 1)]
        return [[Batches(size, accumulate)] for size in sizes] or [free]
    for size in sizes:
        if size not in divisors:
            raise ConfigError(
                f"a batch size must divide the {rows} rows of a step of the preset {base.preset}, "
                f"or --accumulate must say how many make a step, got {size}; what divides them is "
                f"{', '.join(map(str, divisors))}"
            )
    return [[Batches(size, rows // size)] for size in sizes] or [
        [Batches(size, rows // size) for size in divisors]
    ]


def _steps(
    spec: str, accumulate: int, given: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and arguments of `STEPS`: with whole gradients accumulated, then with low-rank ones.

    Without those that a flag of the user rules out.
    """
    name = spec.split("@")[0]
    parameters = inspect.signature(OPTIMIZERS[name].factory).parameters
    # "None" leaves it to the optimizer.
    chosen = cli.values_of([*given, *optimizer_arguments(spec, None)], "--residual")[-1:]
    residuals = {*chosen, OPTIMIZERS[name].fixed.get("residual", "none")}
    sums = _flag(given, "accumulate-in-subspace")
    possible = (
        accumulate > 1
        and "residual" in parameters
        and residuals <= {"none", "None"}
        and sums is not False
    )
    per_layer, remat = _flag(given, "per-layer"), _flag(given, "model.remat")
    for step, flags in STEPS.items():
        if per_layer is not None and per_layer != (step == "per layer"):
            continue
        if remat is not None and step == ("ordinary" if remat else "remat"):
            continue
        if not (sums and possible):
            yield step, flags
        if possible:
            yield f"{step}, low-rank sums", (*flags, *IN_SUBSPACE)


def has_residual(spec: str) -> bool:
    """Whether an optimizer has a residual unless it is told otherwise."""
    factory = OPTIMIZERS[spec.split("@")[0]].factory
    residual = inspect.signature(factory).parameters.get("residual")
    return residual is not None and residual.default != "none"


def has_rank(spec: str) -> bool:
    """Whether an optimizer has a subspace.

    Raises:
      ConfigError: if there is no such optimizer.
    """
    name = spec.split("@")[0]
    if name not in OPTIMIZERS:
        raise ConfigError(f"no optimizer is called {name!r}; there are {', '.join(OPTIMIZERS)}")
    return "rank" in inspect.signature(OPTIMIZERS[name].factory).parameters


def _takes_rank(spec: str) -> bool:
    """Whether an optimizer has a subspace, and its specification does not say of which rank."""
    return has_rank(spec) and "--rank" not in optimizer_arguments(spec, None)


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
    return cli.apart(cli.expand(given, SHORTHANDS, RunConfig))


def _flag(arguments: Sequence[str], name: str) -> bool | None:
    """Value of a flag, if it is there; the last one counts."""
    group, dot, field = name.rpartition(".")
    values = {f"--{name}": True, f"--{group}{dot}no-{field}": False}
    found = [values[word] for word in arguments if word in values]
    return found[-1] if found else None


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Arguments without options that will be given anew, and their values."""
    before = [None, *arguments]
    pairs = zip(before, arguments, strict=False)
    return [
        word
        for previous, word in pairs
        if word.partition("=")[0] not in names and previous not in names
    ]


def _sized(config: RunConfig) -> RunConfig:
    """With the model of --init-from, or the vocabulary that the tokenizer will have, if known."""
    if config.offload != "none":
        raise ConfigError(f"a plan counts one device's memory: no --offload {config.offload}")
    if config.distributed.enabled:
        raise ConfigError("a plan counts one device's memory: no --distributed options")
    if config.init_from is not None:
        return dataclasses.replace(config, model=merge(config, _model_of(config.init_from)))
    known = config.data.tokenizer is None
    return config.with_vocabulary(config.data.vocab_size) if known else config


@functools.cache
def _model_of(weights: str) -> ModelConfig:
    return open_weights(weights).config
