"""Tables of docs that are written by hand have the numbers of the committed results, which are of
the configurations that their commands have today."""

import json
import statistics
from pathlib import Path

import pytest

from benchmarks.common.environment import RESULTS
from benchmarks.common.result_files import read, read_results
from benchmarks.finetuning import continued
from benchmarks.optimizer.compile_time import measure
from benchmarks.pretraining.run_spec import Run, is_done
from benchmarks.pretraining.step_times import read_times

DOCS = Path(__file__).parents[1] / "docs"


def rows(page):
    """The rows of all tables of a page, as lists of cells."""
    lines = (DOCS / page).read_text().splitlines()
    return [cells_of(line) for line in lines if line[:1] == "|"]


def cells_of(line):
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


def recorded(file):
    return json.loads((RESULTS / file).read_text())


@pytest.mark.parametrize(("file", "first"), [("step_time.json", 0), ("step_time_rank_32.json", 1)])
def test_time_of_updates(file, first):
    names = {
        "adamw": "`optax.adamw`",
        "contrib": "`optax.contrib.galore`",
        "galore": "`galore_adamw`",
        "natural": "`natural_galore_adamw`",
    }
    methods = recorded(file)["methods"]
    time = {name: methods[name]["amortised_s"] for name in names}
    for name, shown in names.items():
        of_both_ranks = [row for row in rows("speed.md") if row[0] == shown and len(row) == 6]
        row = of_both_ranks[first]
        assert row[1] == f"{1e3 * time[name]:.0f}"
        assert row[3] == f"{time[name] / time['contrib']:.2f}"
        assert row[4] == f"{time[name] / time['adamw']:.2f}"


def test_time_of_training_steps():
    times = read_times(RESULTS / "quality")
    nano, large = (times[p]["natural-galore"] / times[p]["adamw"] for p in ("nano", "9m"))
    text = " ".join((DOCS / "speed.md").read_text().split())
    assert f"takes {nano:.2f} times AdamW's time at nano and {large:.2f} times at 9m" in text
    readme = (DOCS.parent / "README.md").read_text()
    assert f"a training step takes {nano:.2f} times AdamW's (1 M" in readme


def test_time_to_compile():
    runs = {
        (run["optimizer"], run["matrices"]): run
        for run in recorded("compile_time.json")["runs"]
        if run["shapes"] == "equal"
    }
    shown = [row for row in rows("speed.md") if len(row) == 3 and row[0].startswith("`")]
    assert len(shown) == 9
    for name, *cells in shown:
        of_name = (runs[name.strip("`"), matrices] for matrices in (10, 200))
        assert cells == [f"{run['trace_s'] + run['compile_s']:.1f}" for run in of_name]
    # What is compiled today is what was measured.
    today = measure("natural_galore_adamw", 10, "equal")["equations"]
    assert today == pytest.approx(runs["natural_galore_adamw", 10]["equations"], rel=0.05)


def test_peak_of_llama_7b():
    steps = recorded("gpu_memory_a100_256_tokens.json")["steps"]
    size = {
        (step["method"], step["step"]): f"{step['compiled_for_a100_bytes']['total'] / 1e9:.1f}"
        for step in steps
    }
    shown = {
        "7b, adamw": "adamw",
        "7b, natural-galore, rank 1024": "natural-galore",
        "7b, lean-natural-galore, rank 256": "lean-natural-galore",
        "7b, lean-natural-galore, rank 16": "lean-natural-galore@rank=16",
        "7b, lean-natural-galore, rank 16, `--weight-bits 8`": (
            "lean-natural-galore@rank=16,weight_bits=8"
        ),
    }
    found = [row for row in rows("memory.md") if row[0] in shown]
    assert len(found) == len(shown)
    for name, *cells in found:
        ordinary_and_per_layer = [size.get((shown[name], s), "") for s in ("ordinary", "per layer")]
        assert cells[:2] == ordinary_and_per_layer


def test_temporary_memory_per_layer():
    names = {"adamw": "AdamW", "galore": "GaLore", "natural-galore": "Natural GaLore"}
    columns = [(r, f) for f in ("memory", "default") for r in ("ordinary", "per layer")]
    found = {row[0]: row[1:] for row in rows("per_layer.md")}
    for file, suffix in (
        ("per_layer.json", ""),
        ("per_layer_7b.json", ", 7B, rank 1024, 1024 tokens"),
    ):
        size = {
            (step["optimizer"], step["route"], step["flags"]): step["temporary_bytes"] / 2**20
            for step in recorded(file)["steps"]
        }
        for name in {optimizer for optimizer, *_ in size}:
            shown = found[names[name] + suffix]
            assert shown == [f"{size[name, *column]:,.0f}" for column in columns]


def test_peak_with_moments_in_8_bits():
    steps = recorded("gpu_memory_a100.json")["steps"]
    of_method = {
        method: [
            f"{step['compiled_for_a100_bytes']['total'] / 1e9:.1f}"
            for step in steps
            if (step["method"].split("@")[1], step["step"]) == (method, "per layer")
        ]
        for method in ("moment_bits=8", "moment_bits=8,basis_dtype=int8")
    }
    (few, many), (few_int8, many_int8) = of_method.values()
    sentence = f"per layer: {few} at 256 tokens and {many} at 4,096, with int8 bases {few_int8} and"
    assert f"{sentence} {many_int8}" in " ".join((DOCS / "memory.md").read_text().split())


def test_losses_of_other_texts():
    names = {
        "lean": ("natural-galore-lean", 0.00707, 0.00354),
        "default": ("natural-galore", 0.01, 0.005),
        "AdamW": ("adamw", 0.0025, 0.00125),
        "AdamW, clipped": ("adamw-clipped", 0.005, 0.0025),
        "Muon with AdamW": ("muon", 0.01, 0.005),
    }
    losses = {
        (run["corpus"], run["method"], run["learning_rate"]): f"{run['test_loss']:.3f}"
        for run in read_results(RESULTS / "quality", "other-text")
    }
    table = [row for row in rows("experiments.md") if len(row) == 4]
    start = next(i for i, row in enumerate(table) if "standard library" in row[1])
    shown = {name: cells for name, *cells in table[start + 2 : start + 2 + len(names)]}
    for name, (method, rate, half) in names.items():
        found = [losses[text, method, rate] for text in ("stdlib", "pydoc")]
        assert shown[name] == [*found, losses.get(("pydoc", method, half), "not run")]


def test_losses_at_30m():
    found = {
        (run["method"], run["ratio"]): run["test_loss"]
        for run in read_results(RESULTS / "quality", "width-rule")
    }
    table = [row for row in rows("experiments.md") if len(row) == 7]
    start = next(i for i, row in enumerate(table) if row[0] == "default, rank 128")
    runs = [("natural-galore", 32), ("natural-galore-lean", 16), ("adamw-clipped", 32)]
    runs += [("muon", 8), ("adamw", 64), ("adamw", 128), ("scale", 256)]
    assert table[start + 2] == [f"{found[run]:.3f}" for run in runs]
    default, clipped, unclipped = (found[run] for run in (runs[0], runs[2], runs[4]))
    words = " ".join((DOCS / "experiments.md").read_text().split())
    below = f"{clipped - default:.3f} below AdamW, {unclipped - clipped:.3f} less than without:"
    assert f"With equal clipping the default ends {below}" in words


@pytest.mark.parametrize(
    ("method", "suite", "sign", "sentence"),
    [
        ("galore", "ratio-4", -1, "{} and {} below its tuned 2"),
        ("adamw", "one-seed", 1, "{} and {} above its loss in the tables"),
    ],
)
def test_losses_at_other_rates_than_the_tuned_ones(method, suite, sign, sentence):
    def losses(suite, corpus):
        own = {"method": method, "preset": "nano", "corpus": corpus}.items()
        runs = read_results(RESULTS / "quality", suite)
        return [run["test_loss"] for run in runs if own <= run.items()]

    shown = []
    for corpus in ("shakespeare", "sotu"):
        other, tuned = losses(suite, corpus), losses("main", corpus)
        mean = statistics.mean(other)
        apart = sign * (mean - statistics.mean(tuned))
        shown.append((f"{mean:.3f} ± {statistics.stdev(other):.3f}", apart))
    (shakespeare, a), (addresses, b) = shown
    words = " ".join((DOCS / "experiments.md").read_text().split())
    assert f"ends at {shakespeare} (Shakespeare) and {addresses} (addresses; suite" in words
    assert sentence.format(f"{a:.3f}", f"{b:.3f}") in words


def test_losses_with_several_clipped_singular_values():
    four = "recipe@singular_values=4"
    found = {
        (run["preset"], run["method"], run["learning_rate"], run["ratio"], run["seed"]): run
        for suite in ("tune", "several-values")  # Runs at 9m of the former have another start.
        for run in read_results(RESULTS / "quality", suite)
        if run["corpus"] == "sotu"
    }
    table = [row for row in rows("experiments.md") if len(row) == 6]
    start = next(i for i, row in enumerate(table) if row[1] == "0.0025 × 16")
    rates = [[float(x) for x in cell.split(",")[0].split(" × ")] for cell in table[start][1:]]
    for method, row in zip(("natural-galore", four), table[start + 2 : start + 4], strict=True):
        for (rate, ratio), cell in zip(rates, row[1:], strict=True):
            run = found.get(("9m", method, rate, ratio, 100))
            assert cell.strip("*") == (f"{run['test_loss']:.3f}" if run else "")

    def at_nano(method, rate):
        runs = (found["nano", method, rate, 2.83, seed] for seed in (100, 101))
        return " and ".join(f"{run['final_validation_loss']:.3f}" for run in runs)

    words = " ".join((DOCS / "experiments.md").read_text().split())
    for shown in (at_nano(four, 0.01), at_nano("natural-galore", 0.01), at_nano(four, 0.0141)):
        assert shown in words


def test_losses_in_twice_the_steps():
    names = {
        "default": "natural-galore",
        "lean": "natural-galore-lean",
        "AdamW, clipped": "adamw-clipped",
        "Muon with AdamW": "muon",
        "Fira": "fira",
        "GaLore": "galore",
        "AdamW": "adamw",
        "SCALE": "scale",
    }
    losses = {}
    for suite in ("300-steps", "main"):
        for run in read_results(RESULTS / "quality", suite):
            if run["preset"] == "9m":
                losses.setdefault((suite, run["method"]), []).append(run["test_loss"])
    mean = {of: statistics.fmean(seeds) for of, seeds in losses.items()}
    table = [row for row in rows("experiments.md") if len(row) == 3]
    start = table.index(["", "300 steps", "600 steps"])
    shown = {name: cells for name, *cells in table[start + 2 : start + 2 + len(names)]}
    for name, method in names.items():
        found = [("300-steps", method), ("main", method)]
        assert all(len(losses[of]) == 3 for of in found)
        assert shown[name] == [
            f"{mean[of]:.3f} ± {statistics.stdev(losses[of]):.3f}" for of in found
        ]
        before, after = (mean[of] - mean[of[0], "natural-galore"] for of in found)
        assert name in ("default", "SCALE") or 0.755 <= after / before <= 0.895


def test_losses_of_quadratic_problems():
    columns = {
        "AdamW": "adamw",
        "GaLore": "galore",
        "Fira": "fira",
        "default": "natural-galore, default",
        "without inside": "without the Fisher matrix inside",
        "without outside": "without the Fisher matrix outside",
        "without either": "without either",
        "history of 10 inside": "a history of 10 inside",
    }
    table = [row for row in rows("experiments.md") if len(row) == 1 + len(columns)]
    assert table[0][1:] == list(columns)
    found = {row[0]: row[1:] for row in table[2:]}
    for problem in recorded("curvature.json")["problems"]:
        condition = "10" if problem["condition"] == 10 else "10⁴"
        shown = found[
            f"{condition}, {'as large as the first gradient' if problem['noise'] else 'none'}"
        ]
        for name, cell in zip(columns.values(), shown, strict=True):
            run = problem["methods"][name]
            assert cell.endswith("*") == run["at_edge"]
            assert float(cell.strip("*")) == pytest.approx(run["mean"], rel=0.05, abs=1e-30)


def test_losses_of_continued_training():
    names = {
        "default": "natural-galore",
        "lean, rank 32": "lean-natural-galore",
        "Fira": "fira",
        "LoRA": "lora",
        "AdamW": "adamw",
        "GaLore": "galore",
    }
    found = continued.results_table(read_results(RESULTS / "continued", "main"))
    lines = found.replace("-0.", "−0.")
    printed = {name: found for name, *found in map(cells_of, lines.splitlines())}
    shown = {row[0]: row[1:] for row in rows("pretrained.md") if len(row) == 8}
    for name, method in names.items():
        rate, seeds, state, *losses, _ = printed[method]
        assert shown[name] == [rate, seeds, state, *losses]


@pytest.mark.parametrize(
    ("preset", "method", "rate", "ratio"),
    [
        ("nano", "natural-galore", 0.01, 2.83),
        ("nano", "natural-galore-lean", 0.01, 2.83),
        ("nano", "adamw-clipped", 0.005, 4),
        ("nano", "muon", 0.01, 2),
        ("nano", "scale-clipped", 0.00354, 5.66),
        ("9m", "natural-galore", None, None),
    ],
)
def test_committed_runs_are_those_of_the_commands(preset, method, rate, ratio):
    """Steps, batches, text and all arguments: another configuration is an error."""
    found = list((RESULTS / "quality" / "main" / f"sotu-{preset}").glob(f"{method}-lr*-seed1.json"))
    record = read(found[0])
    assert rate in (None, record["learning_rate"]) and ratio in (None, record["ratio"])
    names = ("suite", "preset", "method", "learning_rate", "ratio", "seed")
    assert is_done(Run(**{name: record[name] for name in names}))
