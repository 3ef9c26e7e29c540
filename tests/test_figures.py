"""Figures: one style, at the width of a page, with nothing below 9 points and the line named."""

import ast
import itertools
import types
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import overview
from benchmarks.distributed import state_layout
from benchmarks.pretraining import figures
from benchmarks.pretraining.summary import Point, Row
from benchmarks.pretraining.tuning import Rates
from examples.common import plots
from examples.common.figures import PAGE, STYLE
from examples.llama.memory.figure import METHODS, STACK, Bar, draw

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
STYLED = ("01_quickstart", "02_how_it_works", "05_many_devices")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a program writes."""
    found = []

    def keep(figure, path, **options):
        figure.draw_without_rendering()
        found.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text().strip()]


def bars():
    return [
        Bar(size, method, 4, per_layer, dict.fromkeys(STACK, gigabytes * 10**9))
        for size, gigabytes in (("1b", 1), ("7b", 4))
        for method, (_, per_layer) in METHODS.items()
    ]


CURVE = {Rates(1e-3, 4.0): 3.0, Rates(2e-3, 4.0): 3.1, Rates(1e-3, 2.0): 3.2}
# The learning rates of one method, none of which diverged.
TUNED: Any = types.SimpleNamespace(rates=Rates(1e-3, 4.0), loss=3.0, curve=CURVE)


def group(*methods):
    """A panel with two points of each method."""
    curve = (Point(1, 4.0), Point(2, 3.0))
    given = {"curve": curve, "state_bytes": 10**6, "steps": 2}
    given |= {"to_reference": None, "test_std": 0.1, "validation": 3.0}
    rows = [Row(m, Rates(1e-3, 4.0), (1,), diverged=0, test=3.0, **given) for m in methods]
    return {(row.method, row.rates): row for row in rows}


GROUPS = {
    ("nano", "sotu"): group("adamw", "scale", "racs", "natural-galore"),
    ("9m", "sotu"): group("adamw", "racs", "lora"),
}
RECORD = {"tokens": 1, "epoch": 1, "perplexity": 2.0, "loss": 1.0}
PROGRESS = [
    {"kind": kind, "metrics": {"success": 0.5, "aware_success": 0.4}, **RECORD}
    for kind in ("train", "validation")
]
PROGRAMS = {
    "overview": lambda path: overview.main(path),
    "layout": lambda path: state_layout.draw(path),
    "memory": lambda path: draw(bars(), path, 24 * 10**9),
    "rates": lambda path: figures.learning_rates({"adamw": TUNED, "muon": TUNED}, path),
    "steps": lambda path: figures.steps(GROUPS, path),
    "time": lambda path: figures.time(GROUPS, path, {"nano": {"adamw": 0.2, "racs": 0.3}}),
    "size": lambda path: figures.size(GROUPS, path),
    "run": lambda path: plots.plot_run(PROGRESS, path, {"bigram": 3.0}, "a run"),
    "methods": lambda path: plots.plot_methods({"adamw": PROGRESS}, path, "methods"),
}


def test_names_of_points_at_one_place_do_not_overlap(drawn, tmp_path):
    PROGRAMS["size"](tmp_path / "figure.svg")
    (figure,) = drawn
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= 3
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.get_points())


@pytest.mark.parametrize("name", PROGRAMS)
def test_text_is_readable_at_the_width_of_a_page(name, drawn, tmp_path):
    before = dict(matplotlib.rcParams)
    PROGRAMS[name](tmp_path / "figure.svg")
    (figure,) = drawn
    width, height = figure.get_size_inches()
    assert width == PAGE and height < 8
    assert texts(figure) and all(text.get_fontsize() >= 9 for text in texts(figure))
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert dict(matplotlib.rcParams) == before
    panels = [axes.get_position() for axes in figure.axes]
    assert all(panel.width > 0.2 and panel.height > 0.2 for panel in panels)


def test_the_line_at_the_memory_of_a_device_is_named(drawn, tmp_path):
    draw(bars(), tmp_path / "memory.png", 24 * 10**9)
    one, seven, legend = drawn[0].axes
    assert not [text for text in texts(one) if text.get_text() == "24 GB"]
    assert [text for text in texts(seven) if text.get_text() == "24 GB"]
    assert [text.get_text() for text in legend.get_legend().get_texts()] == list(STACK)


def test_a_method_has_one_line_in_all_panels_and_one_entry_in_the_legend(drawn, tmp_path):
    figures.steps(GROUPS, tmp_path / "steps.png")
    (legend,) = drawn[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(names) == len(set(names)) == 5
    styles = {}
    for axes in drawn[0].axes:
        for line in axes.get_lines():
            style = (line.get_color(), line.get_linestyle(), line.get_linewidth())
            assert styles.setdefault(line.get_label(), style) == style
    assert len(set(styles.values())) == len(styles) == 5


@pytest.mark.parametrize("name", STYLED)
def test_notebooks_have_the_style(name):
    """Written out: notebooks that install the package alone have no examples."""
    tree = ast.parse((NOTEBOOKS / f"{name}.py").read_text())
    lines = [ast.unparse(node) for node in tree.body]
    with matplotlib.rc_context():
        exec("\n".join(line for line in lines if line.startswith("plt.rcParams")), {"plt": plt})
        for key in ("font.size", "axes.titlesize", "axes.grid", "grid.alpha", "axes.prop_cycle"):
            assert matplotlib.rcParams[key] == STYLE[key], key
