"""The planner: sizes, the choice, and the command that it prints."""

import json
import shlex

import matplotlib.image
import pytest
import tiny_weights as tiny

from examples.common.cli import command
from examples.common.errors import ConfigError
from examples.llama.__main__ import parse
from examples.llama.memory.figure import METHODS, breakdown, draw
from examples.llama.memory.sizes import format_bytes, parse_bytes
from examples.llama.memory.step_memory import StepMemory
from examples.llama.plan import planner
from examples.llama.plan.candidates import STEPS, PlanConfig, candidates
from examples.llama.plan.planner import Row, device_memory, main, search, verdict
from examples.llama.weights.files import open_weights

pytestmark = pytest.mark.usefixtures("fast_compile")

OPTIONS = {
    "model.hidden": 16,
    "model.intermediate": 24,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv-heads": 1,
    "vocab-size": 280,
    "seq-len": 16,
}
SMALL = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("1.5 mb", 1_500_000),
        ("7", 7),
        (".5KiB", 512),
        ("0", 0),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 G", "-1GB", "24GBs", "nan", f"1{'0' * 400}GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="a size is a number and one of kB, MB, GB"):
        parse_bytes(text)


def test_a_device_without_memory_is_refused():
    with pytest.raises(ConfigError, match="--device-memory must be above 0, got '0GB'"):
        device_memory("0GB")


def test_sizes_for_people():
    assert [format_bytes(x) for x in (999, 1000, 1_234_567, -2 * 10**9)] == [
        "999 B",
        "1.00 kB",
        "1.23 MB",
        "-2.00 GB",
    ]


def plan(tmp_path, capsys, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        code = main([*arguments, "--json=~/plans/plan.json", *SMALL])
    return code, capsys.readouterr(), json.loads((tmp_path / "plans" / "plan.json").read_text())


def test_the_command_of_a_setting_that_fits(tmp_path, capsys):
    code, printed, results = plan(
        tmp_path, capsys, "--device-memory", "400kB", "--reserve", "0.5kB", "--optimizers", "adamw"
    )
    assert code == 0
    first = results["settings"][0]
    # Moments of 2 bytes for each parameter, and the sum of gradients in 4.
    assert first["bytes"]["weights"] == 2 * (280 * 16 * 2 + 16 + 2 * (768 + 3 * 384 + 32))
    assert first["bytes"]["inner"] == first["bytes"]["accumulated"] == 2 * first["bytes"]["weights"]
    for row in results["settings"]:
        parts = {name: size for name, size in row["bytes"].items() if name != "total"}
        assert row["bytes"]["total"] == sum(parts.values())
        assert row["fits"] == (row["compiled"] and row["bytes"]["total"] <= 399_500)
    fitting = [row for row in results["settings"] if row["fits"]]
    # The first that fits ends the search; then the same one with more rows.
    assert len(fitting) == 2 and fitting == results["settings"][-2:]
    assert fitting[0]["step"] == fitting[1]["step"]
    assert fitting[0]["batch_size"] == 1 < fitting[1]["batch_size"]
    assert results["best"] == fitting[1]["command"] and results["best"] in printed.out
    words = shlex.split(results["best"])
    assert words[:3] == command("examples.llama").split()
    config = parse(words[3:])
    assert config.optimizer.name == "adamw" and config.seq_len == 16
    assert config.batch_size * config.accumulate == 16  # As in the preset.
    assert "rows of 16 tokens, 256 tokens a step" in " ".join(printed.out.split())
    assert config.model.param_dtype == "bfloat16" and config.model.stacked
    assert {"ordinary": 0, "remat": 1, "per layer": 2}[fitting[0]["step"]] == (
        2 * config.per_layer + config.model.remat
    )


def test_nothing_fits(tmp_path, capsys):
    code, printed, results = plan(
        tmp_path, capsys, "--device-memory", "60kB", "--reserve", "1kB", "--optimizers", "adamw"
    )
    assert code == 0 and results["best"] is None
    assert not any(row["fits"] for row in results["settings"])
    nearest = min(results["settings"], key=lambda row: row["bytes"]["total"])
    assert nearest["compiled"]  # Known in full: by how much it misses.
    over = format_bytes(nearest["bytes"]["total"] - 59_000)
    out = printed.out
    assert f"nothing of these fits; the nearest misses by {over}:\n{nearest['command']}" in out
    assert "--optimizers lean-natural-galore --ranks 8 --accumulate 1 --weight-bits 8\n" in out


def test_the_choice(monkeypatch):
    """A better optimizer before a higher rank before a faster step."""
    total = {"ordinary": 50, "remat": 30, "per layer": 10}

    def row(candidate, room, everything, progress):
        size = total[candidate.step.removesuffix(", low-rank sums")] + 10 * (candidate.rank or 9)
        eight_bits = candidate.config.optimizer.moment_bits == 8
        return Row(candidate, StepMemory(size - 30 * eight_bits, {}, 0, {}), True)

    monkeypatch.setattr(planner, "_row", row)
    optimizers = ("galore", "galore@moment_bits=8", "adamw")
    groups = list(candidates(PlanConfig(optimizers=optimizers, ranks=(4, 2)), SMALL))
    assert [len(group) for group in groups] == [12, 12, 3]  # Galore: sums of whole or low-rank.

    def best(room, **options):
        found = search(groups, room, **options).best
        return found and (found.candidate.optimizer, found.candidate.rank, found.candidate.step)

    assert best(1000) == best(1000, everything=True) == ("galore", 4, "ordinary")
    assert best(75) == ("galore", 4, "remat")
    assert best(40) == ("galore@moment_bits=8", 4, "remat")  # and not galore at rank 2
    assert best(20) == ("galore@moment_bits=8", 4, "per layer")
    assert best(19) == ("galore@moment_bits=8", 2, "per layer")
    assert best(-30) is None
    assert len(search(groups, 1000).rows) == 1 and len(search(groups, 1000, True).rows) == 27


def test_the_most_rows_that_fit(monkeypatch):
    (group,) = candidates(PlanConfig(optimizers=("adamw",)), SMALL)
    compiled = []

    def memory(config):
        """100 bytes, and 7 for each row."""
        return StepMemory(100, {}, 0, {"activations": 7 * config.batch_size})

    def row(candidate, room, everything, progress):
        compiled.append(candidate.config.batch_size)
        return Row(candidate, memory(candidate.config), True)

    monkeypatch.setattr(planner, "_row", row)
    monkeypatch.setattr(planner, "abstract_run", lambda config: config)
    monkeypatch.setattr(planner, "lower_bound", memory)
    for room, rows in ((107, 1), (113, 1), (114, 2), (159, 8), (212, 16), (10**9, 16)):
        best = Row(group[0], memory(group[0].config), True)
        found = planner.most_rows(best, room).candidate
        assert found.config.batch_size == rows and found.config.accumulate == 16 // rows
        assert f"--batch-size {rows} --accumulate {16 // rows}" in found.command
    assert compiled == [2, 8, 16, 16]  # The one that is printed, and no other.


def test_the_most_rows_with_batches_that_are_given(monkeypatch):
    """Rows that take more than the estimate, which two small programs gave."""
    (group,) = candidates(PlanConfig(optimizers=("adamw",)), [*SMALL, "--accumulate", "3"])
    assert [(c.config.batch_size, c.config.accumulate) for c in group] == [(1, 3)] * len(STEPS)
    assert group[0].larger == ((2, 3), (3, 3), (4, 3), (5, 3))  # At most the preset's 16 rows.
    compiled = []

    def memory(config, a_row=10):
        return StepMemory(100, {}, 0, {"activations": a_row * config.batch_size})

    def row(candidate, room, everything, progress):
        compiled.append(candidate.config.batch_size)
        return Row(candidate, memory(candidate.config, 20), True)

    monkeypatch.setattr(planner, "_row", row)
    monkeypatch.setattr(planner, "abstract_run", lambda config: config)
    monkeypatch.setattr(planner, "lower_bound", memory)
    for room, rows in ((200, 5), (199, 4), (150, 2), (139, 1)):
        found = planner.most_rows(Row(group[0], memory(group[0].config), True), room)
        assert (found.candidate.config.batch_size, found.candidate.config.accumulate) == (rows, 3)
        text = verdict(planner.Plan([found], found, found), room)
        assert f"{3 * rows} rows a step instead of the preset's 16:\n" in text
    assert compiled == [5, 5, 4, 5, 2, 3, 2]


def test_low_rank_sums_where_whole_gradients_have_no_room():
    (group,) = candidates(PlanConfig(optimizers=("natural-galore",), ranks=(4,)), SMALL)
    whole, sums = group[-2:]
    assert (whole.step, sums.step) == ("per layer", "per layer, low-rank sums")
    assert sums.config.accumulate_in_subspace and sums.config.optimizer.residual == "none"
    assert not whole.config.accumulate_in_subspace and whole.config.accumulate == 16
    for candidate in (whole, sums):
        row = Row(candidate, StepMemory(0, {}, 0, {}), compiled=True)
        found = verdict(planner.Plan([row], row, row), 10**9)
        # A quarter of nano's rank.
        advice = "--optimizers lean-natural-galore --ranks 8 --accumulate 1"
        assert (advice in found) == (candidate is sums)
    (group,) = candidates(PlanConfig(optimizers=("galore",), ranks=(4,)), SMALL)
    row = Row(group[-1], StepMemory(0, {}, 0, {}), compiled=True)
    assert "without the residual" not in verdict(planner.Plan([row], row, row), 10**9)


@pytest.mark.parametrize(
    ("spec", "more", "sums"),
    [
        ("natural-galore", "--residual fisher", False),
        ("natural-galore@residual=fisher", "--residual none", False),
        ("natural-galore@residual=none", "--residual fisher", True),
        ("natural-galore", "--residual None", True),
        ("natural-galore", "--adapter.kind none", True),
        ("fira", "", False),
    ],
)
def test_low_rank_sums_need_a_run_without_a_residual(spec, more, sums):
    plan = PlanConfig(optimizers=(spec,), ranks=(4,))
    (group,) = candidates(plan, [*SMALL, *more.split()])
    assert [c.step for c in group if "sums" not in c.step] == [*STEPS]
    assert len(group) == len(STEPS) * (1 + sums)
    for candidate in group:
        residual = candidate.config.optimizer.residual
        assert residual == "none" or not candidate.config.accumulate_in_subspace
        assert residual != "none" or sums


def test_the_model_is_that_of_the_weights(tmp_path):
    weights = tiny.write_directory(tmp_path / "model")
    given = ["--init-from", str(weights), "--optimizer", "adamw", "--seq-len", "8"]
    (group,) = candidates(PlanConfig(), given)
    model, expected = group[0].config.model, open_weights(str(weights)).config
    assert (model.hidden, model.layers, model.vocab_size) == (
        expected.hidden,
        expected.layers,
        expected.vocab_size,
    )
    # Products in bfloat16; bfloat16 weights would not move at the rates of further training.
    assert (model.dtype, model.param_dtype) == ("bfloat16", "float32")
    with pytest.raises(ConfigError, match=r"model\.layers=9, and the weights have"):
        list(candidates(PlanConfig(), [*given, "--model.layers", "9"]))


def test_steps_that_an_option_rules_out_are_left_out():
    spec = "galore@moment_bits=8,weight_bits=8"
    (group,) = candidates(PlanConfig(optimizers=(spec,), ranks=(4, 4)), SMALL)
    steps = ("per layer", "per layer, low-rank sums")
    assert [(c.step, c.rank) for c in group] == [(step, 4) for step in steps]
    assert group[0].config.weight_bits == group[0].config.optimizer.moment_bits == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-memory", "24 G"], "--device-memory: a size is a number"),
        (["--device-memory", "1GB", "--reserve", "2GB"], "--reserve 2GB is all of 1.00 GB"),
        ([], "there is no accelerator here: say --device-memory"),
        (["--device-memory", "1GB", "--optimizers", "sgd"], "no optimizer is called 'sgd'"),
        (["--device-memory", "1GB", "--batch-sizes", "0"], "batch_sizes must be at least 1, got 0"),
        (["--device-memory", "1GB", "--ranks", "4", "-1"], "ranks must be at least 1, got 4 -1"),
        (["--device-memory", "1GB", "--figure", "a.foo"], "figure must end in .png, .pdf or .svg"),
        (["--device-memory", "1GB", "--json", "."], "json must be a file, got the directory"),
        (["--device-memory", "1GB", "--offload", "state"], "no --offload state"),
        (["--device-memory", "1GB", "--optimizers", "galore@x"], "NAME or NAME@OPTION=VALUE"),
        (
            [
                "--device-memory=1GB",
                "--optimizer=fira",
                "--rank=4",
                "--accumulate=4",
                "--accumulate-in-subspace",
            ],
            "the residual of fira",
        ),
        (
            [
                "--device-memory=1GB",
                "--optimizer=natural-galore",
                "--rank=2",
                "--adapter.kind=relora",
                "--adapter.rank=4",
            ],
            "relora starts the optimizer of its adapters anew",
        ),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert main([*arguments, *SMALL]) == 1
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert all(note.startswith(("left out: ", "  ")) for note in notes)


@pytest.mark.parametrize("given", [["--adapter.kind=lora", "--adapter.rank=4"], ["--no-per-layer"]])
def test_a_smaller_setting_is_one_that_the_options_allow(capsys, given):
    words = ["--device-memory", "500.1MB", "--optimizers", "adamw", *given, *SMALL]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "nothing of these fits" in out
    assert "--accumulate 1\n" in out and "--weight-bits" not in out


def test_what_is_left_out_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    optimizers = ("galore", "galore@moment_bits=8,basis_dtype=bfloat16")
    words = ["--device-memory", "1GB", "--ranks", "20", "19", "--optimizers", *optimizers]
    assert main([*words, *SMALL]) == 1
    *notes, _ = capsys.readouterr().err.splitlines()
    assert max(map(len, notes)) <= 80
    # Of each optimizer and rank, not of each step.
    starts = [note for note in notes if not note.startswith("  ")]
    assert len(starts) == 4 and starts[0].startswith("left out: galore: galore: where selects no")
    assert len(notes) <= 3 * len(starts)


@pytest.mark.parametrize("wrong", [["--rows", "1"], ["--optimizers", "galore@colour=red"]])
def test_arguments_of_neither_program(capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["--device-memory", "1GB", *wrong, *SMALL])
    assert stop.value.code == 2
    assert "of a plan itself: python -m examples.llama.plan --help" in capsys.readouterr().err


def test_candidates_need_a_known_optimizer():
    with pytest.raises(ConfigError, match="there are adamw"):
        list(candidates(PlanConfig(optimizers=("muon",)), SMALL))


def test_figure(tmp_path):
    bars = breakdown(("nano",), tokens=16)
    assert {bar.method for bar in bars} == set(METHODS)
    assert len(bars) == 2 * len(METHODS) - 2  # AdamW has no step per layer there.
    for bar in bars:
        assert bar.parts["weights"] == bars[0].parts["weights"] > bar.parts["optimizer: basis"]
    adamw, galore = bars[0], next(b for b in bars if b.method == "GaLore" and not b.per_layer)
    assert adamw.parts["gradients"] == galore.parts["gradients"] == adamw.parts["weights"]
    assert galore.parts["activations"] == adamw.parts["activations"]
    draw(bars, tmp_path / "figure.png", limit=bars[0].total)
    assert matplotlib.image.imread(tmp_path / "figure.png").ndim == 3
