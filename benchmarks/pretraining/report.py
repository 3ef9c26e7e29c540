"""Tables and plots of all results, from the result files alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.result_files import read_results, read_suite
from benchmarks.pretraining import figures
from benchmarks.pretraining.fairness import check_tuned
from benchmarks.pretraining.pages import fill_page
from benchmarks.pretraining.run_spec import ROOT
from benchmarks.pretraining.summary import summarise
from benchmarks.pretraining.text import long_page, short
from benchmarks.pretraining.tuning import tuned_by_preset


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
    """Where quality.md, figures/ and, if it has a block for it, experiments.md are."""
    readme: Path = Path("README.md")
    """Gets the short tables, if it has a block for them."""


def make_report(report: Report) -> list[Path]:
    """Writes everything and returns what was written.

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
    names = {name: pictures / f"quality-{name}.png" for name in ("steps", "time", "size")}
    figures.steps(groups, names["steps"])
    figures.time(groups, names["time"])
    figures.size(groups, names["size"])
    for preset, of_preset in tuned.items():
        names[f"learning-rate-{preset}"] = pictures / f"quality-learning-rate-{preset}.png"
        figures.learning_rates(of_preset, names[f"learning-rate-{preset}"])

    page = report.docs / "quality.md"
    page.write_text(long_page(groups, tuned, _links(names, report.docs)))
    written = [*names.values(), page]
    for path in (report.readme, report.docs / "experiments.md"):
        picture = _links({"steps": names["steps"]}, path.parent)
        link = os.path.relpath(page, path.parent)
        if fill_page(path, short(groups, picture["steps"], link)):
            written.append(path)
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
