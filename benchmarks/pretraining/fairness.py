"""Requirements on the tuning of every method in a comparison."""

from collections.abc import Iterable, Mapping

from benchmarks.pretraining.methods import METHODS
from benchmarks.pretraining.summary import RECIPE, Row
from benchmarks.pretraining.tuning import Tuned
from examples.common.errors import ConfigError


def check_tuned(rows: Iterable[Row], tuned: Mapping[str, Tuned]) -> None:
    """Check that every method was tuned as carefully as the default, and ran at its tuned rates.

    Methods with other arguments, ``name@argument=value``, are ablations at the rates of the method
    itself, and are not checked.

    Raises:
      ConfigError: if a method was not tuned, has a best rate or ratio at the edge of what was run,
        had fewer runs than the default, or was run at other rates than its best ones.
    """
    faults = [
        f"{row.method}: {fault}"
        for row in rows
        if row.method in METHODS and (fault := _fault(row, tuned))
    ]
    if faults:
        raise ConfigError(
            "methods are compared at rates that were tuned with equal care, and these were not: "
            + "; ".join(faults)
        )


def _fault(row: Row, tuned: Mapping[str, Tuned]) -> str | None:
    found, needed = tuned.get(row.method), len(tuned[RECIPE].curve) if RECIPE in tuned else 0
    if found is None:
        return "not tuned"
    if found.at_edge:
        return f"the best rates, {found.rates}, are at the edge of those that were run"
    # One rate alone has one axis to search.
    if METHODS[row.method].ratio is None and len(found.curve) < needed:
        return f"{len(found.curve)} tuning runs, where {RECIPE} had {needed}"
    if row.rates != found.rates:
        return f"run at {row.rates}, where tuning found {found.rates}"
    return None
