"""Tables and plots of the comparison, from results made by hand whose statistics are known."""

import copy
import re

import matplotlib.image
import numpy as np
import pytest

from benchmarks.common.result_files import write
from benchmarks.pretraining.__main__ import main
from benchmarks.pretraining.report import BEGIN, END, check_tuned, fill
from benchmarks.pretraining.run_spec import ROOT, Run, prepare
from benchmarks.pretraining.show import Show, show
from benchmarks.pretraining.step_times import file_of
from benchmarks.pretraining.summary import Point, separated, steps_to, summarise
from benchmarks.pretraining.sweep import Sweep, runs
from benchmarks.pretraining.tables import label, losses, tuning, verdicts
from benchmarks.pretraining.tuning import Rates, tuned_rates
from examples.common.errors import ConfigError


def result(
    method,
    seed=1,
    curve=(6.0, 5.0, 4.0),
    test=4.0,
    rate=0.01,
    ratio=4.0,
    corpus="sotu",
    preset="nano",
    **more,
):
    """A result file's content: 300 steps, evaluated every 100."""
    run = Run(method=method, learning_rate=rate, ratio=ratio, seed=seed, preset=preset, steps=300)
    lost = curve[-1] is None
    return {
        "suite": "main",
        "corpus": corpus,
        "preset": preset,
        "method": method,
        "label": method,
        "learning_rate": rate,
        "ratio": ratio,
        "seed": seed,
        "workers": 2,
        "configuration": prepare(run).configuration,
        "text": {"fingerprint": corpus},
        "state_bytes": 3 * 2**19,
        "diverged": lost or more.pop("diverged", False),
        "final_validation_loss": curve[-1],
        "test_loss": None if lost else test,
        "step_seconds": 0.25,
        "first_step_seconds": 10.0,
        "validation": [
            [100 * i, 1000 * i, loss, 10.0 + 25 * i] for i, loss in enumerate(curve, start=1)
        ],
        "wall_seconds": 90.0,
        **more,
    }


def row(records, method, corpus="sotu"):
    (found,) = [r for r in summarise(records)["nano", corpus].values() if r.method == method]
    return found


ADAMW = [
    result("adamw", 1, (6.0, 5.0, 4.0), test=4.1),
    result("adamw", 2, (6.2, 5.2, 4.4), test=4.5),
]


def test_mean_and_standard_deviation_over_seeds():
    found = row([*ADAMW, result("adamw", 3, (6.4, 5.4, 4.8), test=4.6)], "adamw")
    assert found.seeds == (1, 2, 3)
    assert found.test == pytest.approx(4.4)
    # sqrt((0.3² + 0.1² + 0.2²) / 2)
    assert found.test_std == pytest.approx(np.sqrt(0.07))
    assert found.validation == pytest.approx(4.4)
    assert [p.loss for p in found.curve] == pytest.approx([6.2, 5.2, 4.4])
    assert row(ADAMW[:1], "adamw").test_std is None


def test_steps_to_the_final_loss_of_adamw():
    # AdamW's mean final validation loss is 4.2. The mean curve of the other is 5.7, 4.6, 3.8: at
    # 4.2 half-way between steps 200 and 300.
    fast = [result("galore", 1, (5.6, 4.5, 3.7)), result("galore", 2, (5.8, 4.7, 3.9))]
    assert row([*ADAMW, *fast], "galore").to_reference == pytest.approx(250 / 300)
    slow = [result("galore", 1, (5.6, 4.5, 4.3))]
    assert row([*ADAMW, *slow], "galore").to_reference == float("inf")
    assert row(slow, "galore").to_reference is None  # no AdamW at all
    (alone,) = summarise(slow, reference=ADAMW)["nano", "sotu"].values()
    assert alone.to_reference == float("inf")
    (alone,) = summarise(fast, reference=ADAMW)["nano", "sotu"].values()
    assert alone.to_reference == pytest.approx(250 / 300)


def test_steps_to():
    curve = [Point(100, 6.0), Point(200, 5.0), Point(300, 5.5), Point(400, 4.0)]
    assert steps_to(curve, 6.0) == 100
    assert steps_to(curve, 5.25) == 175
    assert steps_to(curve, 4.75) == 350
    assert steps_to(curve, 3.9) is None


def test_table():
    records = [
        *ADAMW,
        result("galore", 1, (5.6, 4.5, 3.7), test=3.8),
        result("fira", 1, (5.6, 4.5, None)),
        result("fira", 2, (5.6, 4.5, 4.1)),
        result("adamw", 1, (6.0, 5.0, 4.0), test=3.5, corpus="shakespeare"),
    ]
    lines = losses(
        summarise(records), "nano", ["adamw", "galore", "muon", "fira", "apollo-mini"]
    ).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    assert cells["AdamW"] == [
        *("0.01 × 4", "1.50", "100 %", "3.500 (1 of 2 seeds)", "4.300\u00a0±\u00a00.283"),
        *("100 %", "100 %", "not timed"),
    ]
    assert cells["GaLore"] == [
        *("0.01 × 4", "1.50", "100 %"),
        *("not run", "3.800 (1 of 2 seeds)", "not run", "79 %", "not timed"),
    ]
    assert cells["Fira"][4] == "diverged (1 of 2)" and cells["Fira"][6] == "diverged"
    assert cells["Muon with AdamW"] == ["not run"] * 8
    assert len({line.count("|") for line in lines}) == 1
    worse = [*records, result("adamw", 1, (7.0, 6.0, 5.0), rate=0.1)]
    worse = losses(summarise(worse), "nano", ["adamw"])
    (line,) = [line for line in worse.splitlines() if "0.1 × 4" in line]
    assert "not reached" in line and "100 % | 100 %" not in line


def test_runs_that_differ_are_not_put_into_one_table():
    other = copy.deepcopy(ADAMW[1])
    other["configuration"]["run"]["steps"] = 200
    with pytest.raises(ConfigError, match=r"seed 1 and .* seed 2 cannot be compared: steps is 300"):
        summarise([ADAMW[0], other])
    other = copy.deepcopy(ADAMW[1])
    other["text"]["fingerprint"] = "changed"
    with pytest.raises(ConfigError, match="text"):
        summarise([ADAMW[0], other])
    other = copy.deepcopy(ADAMW[1])
    other["configuration"]["arguments"]["b2"] = 0.95
    with pytest.raises(ConfigError, match="made with other arguments"):
        summarise([ADAMW[0], other])


def test_verdicts():
    def two(method, low, high):
        return [result(method, 1, test=low), result(method, 2, test=high)]

    records = [
        *two("natural-galore", 4.0, 4.1),
        *two("adamw", 4.3, 4.4),
        *two("galore", 4.0, 4.3),
        *two("fira", 3.7, 3.8),
        result("muon", 1, (5.0, 4.0, None)),
        result("adafactor", 1, test=4.0),
    ]
    rows = summarise(records)["nano", "sotu"].values()
    assert set(verdicts(rows)) == {
        "lower by more than the standard deviations: AdamW -0.300",
        "the standard deviations overlap: GaLore -0.100",
        "higher by more than the standard deviations: Fira +0.300",
        "diverged: Muon with AdamW",
        "one seed: Adafactor +0.050",
    }
    by_name = {r.method: r for r in rows}
    assert separated(by_name["natural-galore"], by_name["adamw"])
    assert not separated(by_name["adamw"], by_name["natural-galore"])
    assert verdicts(summarise(ADAMW)["nano", "sotu"].values()) == []


def tune(method, by_rates, corpus="sotu", seed=100, preset="nano"):
    return [
        result(method, seed, (6.0, 5.0, loss), rate=rate, ratio=r, corpus=corpus, preset=preset)
        for (rate, r), loss in by_rates.items()
    ]


# The best point in the middle of a cross.
CROSS = {(0.01, 4): 4.0, (0.02, 4): 4.1, (0.005, 4): 4.1, (0.01, 8): 4.1, (0.01, 2): 4.1}


def test_tuned_rates_are_best_on_average():
    records = [
        # (0.02, 4) is best on one text, (0.01, 4) on average.
        *tune("adamw", CROSS | {(0.02, 4): 3.9, (0.04, 4): None}),
        *tune("adamw", CROSS | {(0.02, 4): 4.4, (0.04, 4): 3.0}, corpus="shakespeare"),
        # The highest ratio is best; and best of all but incomplete is 8.
        *tune("galore", {(0.01, 2): 4.2, (0.01, 4): 4.0, (0.01, 8): 1.0}),
        *tune("galore", {(0.01, 2): 4.2, (0.01, 4): 4.0}, corpus="shakespeare"),
        # The highest rate that did not diverge, beside one that did.
        *tune("fira", {**CROSS, (0.02, 4): None}),
        *tune("muon", {(0.01, 4): None}),
        *tune("muon", {(0.01, 4): 1.0}, preset="9m"),
        *tune("adamw-one-rate", {(0.01, 1): 4.2, (0.02, 1): 4.3, (0.005, 1): 4.4}),
    ]
    tuned = tuned_rates(records, "nano")
    assert {name: (t.rates, t.at_edge) for name, t in tuned.items()} == {
        "adamw": (Rates(0.01, 4), False),
        "adamw-one-rate": (Rates(0.01, 1), False),
        "galore": (Rates(0.01, 4), True),
        "fira": (Rates(0.01, 4), False),
    }
    assert tuned["adamw"].loss == pytest.approx(4.0)
    assert tuned["adamw"].curve[Rates(0.04, 4)] is None
    assert Rates(0.01, 8) not in tuned["galore"].curve
    text = tuning(tuned)
    (galore,) = [line for line in text.splitlines() if "| GaLore" in line]
    assert "| **0.01 × 4** (at the edge) | 4.000 | 2 | 1 |" in galore
    (adamw,) = [line for line in text.splitlines() if "| AdamW |" in line]
    assert "| **0.01 × 4** | 4.000 | 6 | 1 |" in adamw and "0.04 × 4: diverged" in adamw
    brief = [line.rsplit(" |", 2)[0] + " |" for line in text.splitlines()]
    assert tuning(tuned, brief=True).splitlines() == brief


def test_a_sweep_takes_the_tuned_rates(tmp_path):
    records = [*tune("adamw", {(0.001, 8): 4.5, (0.003, 2): 4.0})]
    records += tune("galore", {(0.01, 4): 4.0, (0.03, 4): 4.1})
    records += tune("galore@rank=16", {(0.01, 4): 4.0, (0.03, 4): 3.9})
    for record in records:
        name = "{method}-lr{learning_rate:g}.json".format(**record)
        write(record, tmp_path / "tune" / "sotu-nano" / name)
    methods = ("adamw", "galore", "galore@rank=16", "galore@rank=8")
    sweep = Sweep(methods=methods, corpora=("sotu",), seeds=(1,), root=tmp_path)
    assert [(run.learning_rate, run.ratio) for run in runs(sweep)] == [
        *((0.003, 2), (0.01, 4), (0.03, 4), (0.01, 4)),
    ]


def test_rates_of_another_size_follow_the_width(tmp_path):
    for record in [*tune("adamw", {(0.004, 2): 4.0}), *tune("muon", {(0.004, 2): 4.0})]:
        write(record, tmp_path / "tune" / "sotu-nano" / "{method}.json".format(**record))
    given = {"corpora": ("sotu",), "seeds": (1,), "tune_preset": "nano", "tune_root": tmp_path}
    wider = Sweep(methods=("adamw", "muon"), preset="9m", **given)
    assert [(r.learning_rate, r.ratio) for r in runs(wider)] == [(0.002, 4), (0.004, 2)]


@pytest.mark.parametrize(
    ("method", "points", "fault"),
    [
        ("adamw", CROSS, None),
        ("adamw", {}, "adamw: not tuned"),
        ("adamw", {**CROSS, (0.02, 4): 3.5}, r"adamw: the best rates, 0.02 × 4, are at the edge"),
        ("adamw", {k: CROSS[k] for k in [*CROSS][:4]}, "adamw: the best rates, .* at the edge"),
        ("natural-galore", {**CROSS, (0.04, 4): 5.0}, "adamw: 5 tuning runs, where natural-galore"),
        ("adamw", {(2 * a, b): loss for (a, b), loss in CROSS.items()}, "adamw: run at 0.01 × 4"),
    ],
)
def test_a_table_of_methods_tuned_with_less_care_is_refused(method, points, fault):
    by_method = {"adamw": CROSS, "natural-galore": CROSS, method: points}
    tuned = tuned_rates([r for m, p in by_method.items() for r in tune(m, p)], "nano")
    rows = summarise([result("adamw"), result("natural-galore"), result("adamw@b2=0.9", rate=1)])
    if fault is None:
        check_tuned(rows["nano", "sotu"].values(), tuned)
    else:
        with pytest.raises(ConfigError, match=fault):
            check_tuned(rows["nano", "sotu"].values(), tuned)


def test_label_shows_what_was_changed():
    assert label("galore") == "GaLore"
    assert label("galore@rank=8,side=long") == "GaLore, rank=8, side=long"
    assert label("galore-8bit") == "GaLore, 8-bit moments"
    inside = label("natural-galore@damping=1e6")
    assert inside == "Natural GaLore, default, without the Fisher matrix inside"
    assert label("of-another-time") == "of-another-time"


def test_block_of_a_page_is_filled_again_and_again():
    page = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    once = fill(page, "\n| a |\n| b |\n")
    assert once == f"before\n\n{BEGIN}\n| a |\n| b |\n{END}\n\nafter\n"
    assert fill(once, "| a |\n| b |") == once
    assert fill("no block\n", "x") == "no block\n"
    for wrong in (BEGIN, END, END + BEGIN, page + page):
        with pytest.raises(ConfigError, match="once each"):
            fill(wrong, "x")


@pytest.fixture
def root(tmp_path):
    records = [*ADAMW, result("natural-galore", 1, (5.0, 4.0, 3.5), test=3.6)]
    records += [result("galore", 1, (5.0, 4.0, None))]
    records += [result("adafactor", 1, corpus="shakespeare")]
    tuned = [r for m in ("adamw", "natural-galore", "galore", "adafactor") for r in tune(m, CROSS)]
    tuned += tune("galore", {(0.04, 4): None})
    for suite, of_suite in (("main", records), ("tune", tuned)):
        for r in of_suite:
            name = "{method}-lr{learning_rate:g}-x{ratio:g}-seed{seed}.json".format(**r)
            write(r, tmp_path / "results" / suite / f"{r['corpus']}-{r['preset']}" / name)
    write({"nano": {"seconds": {"adamw": 0.25}}}, file_of(tmp_path / "results"))
    return tmp_path / "results"


def test_report_fills_the_documentation(root, tmp_path, capsys):
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text(f"# Title\n{BEGIN}\n{END}\nend\n")
    docs.mkdir()
    (docs / "mathematics.md").touch()
    command = ["report", "--root", str(root), "--docs", str(docs), "--readme", str(readme)]
    assert main(command) == 0
    texts = [p.read_text() for p in (readme, docs / "quality.md")]
    for text, rates in zip(texts, ("", r" 0\.01 × 4 \|"), strict=True):
        line = rf"\| Natural GaLore, default \|{rates} 1\.50 \| 100 % \| not run \| 3\.600"
        assert re.search(line, text)
        assert "diverged (1 of 1)" in text
    assert "Not run: 9m, 60m." in texts[0] and "not run." in texts[1]
    # Links work from where the page is.
    for page, text in zip((readme, docs / "x"), texts, strict=True):
        targets = re.findall(r"\]\(([^)#]+)", text)
        assert targets
        for target in targets:
            if "benchmarks" not in target:
                assert (page.parent / target).exists(), target
    assert "Adafactor" in texts[1] and "Adafactor" not in texts[0]
    assert re.search(r"\| AdamW \|.* 250 \|", texts[1])
    assert re.search(r"\| Natural GaLore, default \|.* not timed \|", texts[1])
    assert "one seed" in texts[1] and "| **0.01 × 4** | " in texts[1]
    pictures = sorted(p.name for p in (docs / "figures").iterdir())
    assert pictures == [
        "quality-learning-rate-nano.png",
        "quality-size.png",
        "quality-steps.png",
        "quality-time.png",
    ]
    for name in pictures:
        image = matplotlib.image.imread(docs / "figures" / name)
        assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10

    assert main(command) == 0
    assert [p.read_text() for p in (readme, docs / "quality.md")] == texts


def test_report_makes_no_block_of_its_own(root, tmp_path):
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text("# Title\n")
    assert main(["report", "--root", str(root), "--docs", str(docs), "--readme", str(readme)]) == 0
    assert readme.read_text() == "# Title\n"
    assert not (docs / "experiments.md").exists()


def test_show_prints_a_suite(root, capsys):
    assert main(["show", "--root", str(root), "--suite", "tune"]) == 0
    text = capsys.readouterr().out
    assert "AdamW" in text and "**0.01 × 4**" in text


@pytest.mark.parametrize("suite", sorted(path.name for path in ROOT.iterdir() if path.is_dir()))
def test_every_committed_suite_is_shown(suite):
    """Also runs of methods and arguments that the library has no more: the pages quote them."""
    assert "| rate × ratio |" in show(Show(suite=suite))


def test_show_puts_runs_beside_others(root, tmp_path, capsys):
    ours = result("adamw", 1, test=4.15)
    write(ours, tmp_path / "fresh" / "main" / "sotu-nano" / "a.json")
    extra = result("adamw", 7, (5.0, 4.0, None))
    write(extra, tmp_path / "fresh" / "main" / "sotu-nano" / "b.json")
    fresh = ["show", "--root", str(tmp_path / "fresh")]
    assert main([*fresh, "--against", str(root)]) == 0
    text = capsys.readouterr().out
    assert "| nano | sotu | adamw | 0.01 | 4.0 | 1 | 4.1500 | 4.1000 | +0.0500 |" in text
    assert "| nano | sotu | adamw | 0.01 | 4.0 | 7 | diverged |  |  |" in text


@pytest.mark.parametrize("command", ["report", "show"])
def test_no_results_is_one_line(command, tmp_path, capsys):
    assert main([command, "--root", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no results" in line


def test_a_file_that_is_no_result_is_named(root, capsys):
    (root / "main" / "sotu-nano" / "x.json").write_text("{")
    assert main(["show", "--root", str(root)]) == 1
    assert "x.json: not a result file" in capsys.readouterr().err


def test_a_report_of_unfair_runs_writes_nothing(root, tmp_path, capsys):
    for path in (root / "tune").glob("*/adamw-lr0.02*"):
        path.unlink()
    docs = tmp_path / "docs"
    assert main(["report", "--root", str(root), "--docs", str(docs)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "adamw: the best rates, 0.01 × 4, are at the edge" in line
    assert not docs.exists()
