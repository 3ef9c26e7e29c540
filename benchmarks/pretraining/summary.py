"""Statistics over seeds, from result files alone."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.common.result_files import Json
from benchmarks.pretraining.methods import place
from benchmarks.pretraining.presets import PRESETS
from benchmarks.pretraining.tuning import Rates, rates_of
from examples.common.errors import ConfigError
from examples.llama.run_config import RunConfig

REFERENCE = "adamw"  # with two rates, as every other method
RECIPE = "natural-galore"

Group = tuple[str, str]  # preset and corpus


class Point(NamedTuple):
    """A point of a mean validation curve."""

    step: float
    loss: float


class Row(NamedTuple):
    """One method at one pair of rates, preset and corpus."""

    method: str
    rates: Rates
    seeds: tuple[int, ...]
    diverged: int  # how many of the seeds; above 0 there are no losses and no curve
    test: float  # mean final test loss, nats per token
    test_std: float | None  # sample standard deviation; None for one seed
    validation: float  # mean final validation loss
    curve: tuple[Point, ...]  # mean validation curve
    state_bytes: int
    steps: int
    # Steps until the reference's final loss, as a share of its steps: infinite if they were not
    # enough, None without a reference.
    to_reference: float | None


def summarise(
    records: Iterable[Json], reference: Iterable[Json] = ()
) -> dict[Group, dict[tuple[str, Rates], Row]]:
    """Rows by preset and corpus, then by method and rates.

    Args:
      records: The results of a suite.
      reference: Results that AdamW is taken from where a group of ``records`` has no AdamW and
        the protocol is the same.

    Raises:
      ConfigError: if runs of a group differ in more than method, rates and seed.
    """
    groups: dict[Group, list[Json]] = defaultdict(list)
    for record in records:
        groups[record["preset"], record["corpus"]].append(record)
    others = [r for r in reference if r["method"] == REFERENCE]
    return {group: _rows(groups[group], others) for group in sorted(groups, key=_size)}


def protocol(record: Json) -> Json:
    """Settings that all runs of a group must share."""
    run = record["configuration"]["run"]
    # An option of the text that the training program has got since then was at its default.
    data = {k: v for k, v in RunConfig().to_dict()["data"].items() if k != "cache_dir"}
    return {
        **{key: run[key] for key in ("steps", "seq_len", "schedule")},
        "data": {**data, **run["data"]},
        "rows": run["batch_size"] * run["accumulate"],
        "dtype": run["model"]["dtype"],
        "param_dtype": run["model"]["param_dtype"],
        "eval_every": run["output"]["eval_every"],
        "validation_tokens": record["configuration"]["validation_tokens"],
        "text": record["text"],
    }


def steps_to(curve: Sequence[Point], target: float) -> float | None:
    """The step at which a curve, linear between its points, first is at ``target`` or below."""
    before = None
    for point in curve:
        if point.loss <= target:
            if before is None:
                return point.step
            share = (before.loss - target) / (before.loss - point.loss)
            return before.step + share * (point.step - before.step)
        before = point
    return None


def separated(low: Row, high: Row) -> bool:
    """Whether the mean of ``low`` is below by more than both standard deviations."""
    if low.test_std is None or high.test_std is None:
        return False
    return low.test + low.test_std < high.test - high.test_std


def best(rows: Iterable[Row], method: str) -> Row | None:
    """The row of a method, at its best rates on the validation split."""
    rows = [r for r in rows if r.method == method]
    usable = [r for r in rows if not r.diverged] or rows
    return min(usable, key=lambda r: r.validation, default=None)


def _rows(records: list[Json], others: list[Json]) -> dict[tuple[str, Rates], Row]:
    common = protocol(records[0])
    for record in records[1:]:
        for key, value in protocol(record).items():
            if value != common[key]:
                raise ConfigError(
                    f"{_name(records[0])} and {_name(record)} cannot be compared: {key} is "
                    f"{common[key]} and {value}"
                )
    runs = _by_method(records)
    reference = best((_row(r, None) for r in runs.values()), REFERENCE)
    if reference is None:
        same = [r for r in others if protocol(r) == common]
        reference = best((_row(r, None) for r in _by_method(same).values()), REFERENCE)
    if reference is not None and reference.diverged:
        reference = None
    return {
        key: _row(runs[key], reference)
        for key in sorted(runs, key=lambda key: (place(key[0]), key[1]))
    }


def _by_method(records: list[Json]) -> dict[tuple[str, Rates], list[Json]]:
    runs: dict[tuple[str, Rates], list[Json]] = defaultdict(list)
    for record in records:
        runs[record["method"], rates_of(record)].append(record)
    return runs


def _row(records: list[Json], reference: Row | None) -> Row:
    for record in records[1:]:
        if record["configuration"]["arguments"] != records[0]["configuration"]["arguments"]:
            raise ConfigError(
                f"{_name(records[0])} and {_name(record)} were made with other arguments"
            )
    diverged = sum(r["diverged"] for r in records)
    tests = [r["test_loss"] for r in records]
    curve = () if diverged else _mean_curve(records)
    steps = records[0]["configuration"]["run"]["steps"]
    if reference is None:
        to_reference = None
    elif (records[0]["method"], rates_of(records[0])) == (REFERENCE, reference.rates):
        to_reference = 1.0
    else:
        reached = steps_to(curve, reference.validation)
        to_reference = math.inf if reached is None else reached / steps
    nan = float("nan")
    return Row(
        method=records[0]["method"],
        rates=rates_of(records[0]),
        seeds=tuple(sorted(r["seed"] for r in records)),
        diverged=diverged,
        test=nan if diverged else statistics.fmean(tests),
        test_std=None if diverged or len(tests) < 2 else statistics.stdev(tests),
        validation=nan if diverged else curve[-1].loss,
        curve=curve,
        state_bytes=records[0]["state_bytes"],
        steps=steps,
        to_reference=to_reference,
    )


def _mean_curve(records: list[Json]) -> tuple[Point, ...]:
    curves = [[(step, loss) for step, _, loss, _ in r["validation"]] for r in records]
    means = [
        [statistics.fmean(values) for values in zip(*points, strict=True)]
        for points in zip(*curves, strict=True)
    ]
    return tuple(Point(step, loss) for step, loss in means)


def _size(group: Group) -> tuple[int, str, str]:
    """The order of the presets, those that are not there any more last; then by name."""
    preset, corpus = group
    names = list(PRESETS)
    return names.index(preset) if preset in names else len(names), preset, corpus


def _name(record: Json) -> str:
    return "{suite}/{corpus}-{preset} {method} lr {learning_rate:g} × {ratio:g} seed {seed}".format(
        **record
    )
