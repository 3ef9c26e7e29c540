"""Tables and plots of all results, from the result files alone."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.result_files import read_results, read_suite
from benchmarks.pretraining import figures
from benchmarks.pretraining.methods import METHODS
from benchmarks.pretraining.run_spec import ROOT
from benchmarks.pretraining.step_times import read_times
from benchmarks.pretraining.summary import RECIPE, Row, summarise
from benchmarks.pretraining.tables import long_page, short
from benchmarks.pretraining.tuning import Tuned, tuned_by_preset
from examples.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make tables and plots of the suites, and put them into the documentation."""

    root: Path = ROOT
    """Directory of all results."""
    suite: str = "main"
    """Suite of the tables."""
    tune_suite: str = "tune"
    """Suite of the learning rates."""
    tune_preset: str = "nano"
    """Preset whose tuned rates the presets have that were not tuned themselves."""
    docs: Path = Path("docs")
    """Directory of quality.md and figures/."""
    readme: Path = Path("README.md")
    """Gets the short tables, if it has a block for them."""


def make_report(report: Report) -> list[Path]:
    """Write everything and return the paths.

    Raises:
      ConfigError: if there are no results, or runs that cannot be compared, or a method of the
        tables was tuned with less care than the default.
    """
    groups = summarise(read_results(report.root, report.suite))
    tuned = tuned_by_preset(read_suite(report.root, report.tune_suite))
    for preset, corpus in groups:
        check_tuned(groups[preset, corpus].values(), tuned.get(preset) or tuned[report.tune_preset])
    pictures = report.docs / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    seconds = read_times(report.root)
    shown = ("steps", "time", "size") if seconds else ("steps", "size")
    names = {name: pictures / f"quality-{name}.png" for name in shown}
    figures.steps(groups, names["steps"])
    if seconds:
        figures.time(groups, names["time"], seconds)
    figures.size(groups, names["size"])
    for preset, of_preset in tuned.items():
        names[f"learning-rate-{preset}"] = pictures / f"quality-learning-rate-{preset}.png"
        figures.learning_rates(of_preset, names[f"learning-rate-{preset}"])

    page = report.docs / "quality.md"
    page.write_text(long_page(groups, tuned, _links(names, report.docs), seconds))
    written = [*names.values(), page]
    link = os.path.relpath(page, report.readme.parent)
    if fill_page(report.readme, short(groups, link)):
        written.append(report.readme)
    return written


def _links(pictures: Mapping[str, Path], page: Path) -> dict[str, str]:
    titles = {
        "steps": "Validation loss over steps",
        "time": "Validation loss over time",
        "size": "Test loss over bytes of optimizer state",
    }
    return {
        name: f"![{titles.get(name, 'Loss over both rates')}]({os.path.relpath(path, page)})"
        for name, path in pictures.items()
    }


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


BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"


def fill(text: str, content: str) -> str:
    """``text`` with ``content`` between the two marks, instead of what was there.

    A text without marks is returned as it is.

    Raises:
      ConfigError: unless there is one of each mark, in order, or none.
    """
    if BEGIN not in text and END not in text:
        return text
    parts = re.split(f"({BEGIN}|{END})", text)
    if parts[1::2] != [BEGIN, END]:
        raise ConfigError(f"needed once each, in this order: {BEGIN} and {END}")
    return f"{parts[0]}{BEGIN}\n{content.strip()}\n{END}{parts[4]}"


def fill_page(path: Path, content: str) -> bool:
    """Fill the block of a page; whether there is such a page with a block."""
    if not path.exists():
        return False
    text = path.read_text()
    try:
        filled = fill(text, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if filled != text:
        path.write_text(filled)
    return BEGIN in text
