"""The benchmarks at a tiny size: their files have what is documented, and the floor is right."""

import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import optax
import pytest
import tyro

from benchmarks import gpu as all_on_gpu
from benchmarks.common.environment import target
from benchmarks.common.shapes import hidden_shapes, matrices
from benchmarks.distributed import exchange, sharding, state_layout
from benchmarks.memory import gpu, gpu_run, per_layer
from benchmarks.memory.step_bytes import step_bytes
from benchmarks.optimizer import compile_time, curvature, quantization, refresh, step_time
from benchmarks.optimizer.floor import accelerator_bounds, bytes_moved, floor_seconds, operations
from examples.common.errors import ConfigError
from examples.llama.__main__ import parse
from examples.llama.data import DataConfig
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.training.train_step import make_model

ENVIRONMENT = {
    *("command", "date", "seed", "python", "versions", "device", "cpu", "cores"),
    *("usable_cores", "threads", "load_average"),
}
METHOD = {
    *("computed", "cold_start_s", "median_s", "amortised_s", "worst_s", "worst_to_median"),
    *("worst_repeated_s", "worst_repeated_to_median", "accelerator_bounds_s", "bytes"),
    *("operations", "floor_s", "fresh_floor_s", "amortised_to_floor", "amortised_to_fresh_floor"),
}


def test_floor_of_one_matrix_by_hand():
    # 4 × 6 at rank 2: k = 24, P 4 × 2 (or 6 × 2 on the longer side), moments 2 × 6 (or 2 × 4).
    floats = {"adamw": 168, "galore": 72 + 8 + 48, "contrib": 72 + 12 + 32}
    for sides in [(4, 6)], [(6, 4)]:
        for method, count in floats.items():
            assert bytes_moved(method, sides, rank=2) == 4 * count
        # Three columns of 12 are read and one is written.
        assert bytes_moved("natural", sides, rank=2, history=3) == 4 * (128 + 48)
        assert operations("galore", sides, rank=2) == 4 * 4 * 6 * 2
        assert operations("adamw", sides, rank=2) == 0
    assert bytes_moved("adamw", [(4, 6), (1, 5)], rank=2) == 4 * (168 + 35)
    # A rank above the shorter side is clipped to it.
    assert operations("natural", [(4, 6)], rank=9) == 4 * 4 * 6 * 4
    # 10 bytes at 5 bytes/s, then 12 operations at 3 operations/s.
    assert floor_seconds(10, 12, bandwidth=5.0, rate=3.0) == 6.0
    # On an accelerator the longer of the two: memory, then products.
    assert accelerator_bounds(335, 1)["H100"] == pytest.approx(1e-10)
    assert accelerator_bounds(1, 197)["TPU v5e"] == pytest.approx(1 / 0.819e12)
    assert accelerator_bounds(1, 197_000)["TPU v5e"] == pytest.approx(1e-9)


def test_the_readme_lists_every_program():
    folder = pathlib.Path(__file__).parents[1] / "benchmarks"
    introduction = (folder / "README.md").read_text().split("\n## ")[0]
    modules = {
        ".".join(p.relative_to(folder).with_suffix("").parts).removesuffix(".__main__")
        for p in folder.rglob("*.py")
        if '__name__ == "__main__"' in p.read_text()
    }
    assert modules - {"common.child"} == set(re.findall(r"^\| \[?`([\w.]+)`", introduction, re.M))


OPTIMIZERS = ("optax.adamw", "galore_adamw")


def test_compile_time(tmp_path):
    path = tmp_path / "compile_time.json"
    results = compile_time.main((2,), OPTIMIZERS, path)
    runs = json.loads(path.read_text())["runs"]
    assert runs == results["runs"] and len(runs) == 4
    adamw, galore = ({r["equations"] for r in runs if r["optimizer"] == o} for o in OPTIMIZERS)
    assert 20 < max(adamw) < min(galore)
    assert all(r["trace_s"] > 0 and r["compile_s"] > 0 for r in runs)


@pytest.mark.parametrize(
    ("main", "option"),
    [
        *((exchange.main, option) for option in ("preset", "sizes")),
        (state_layout.main, "sizes"),
        *((program.main, "preset") for program in (sharding, step_time, refresh, quantization)),
    ],
)
def test_an_unknown_model_is_a_wrong_argument(main, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(main, args=[f"--{option}", "600m"])
    assert "invalid choice '600m'" in capsys.readouterr().err


def test_hidden_matrices_of_60m():
    shapes = hidden_shapes("60m")
    sides = matrices(shapes)
    assert len(shapes) == len(sides) == 56
    assert {s: sides.count(s) for s in sides} == {(512, 512): 32, (512, 1376): 16, (1376, 512): 8}
    stacked = hidden_shapes("60m", stacked=True)
    assert len(stacked) == 7 and sorted(matrices(stacked)) == sorted(sides)


def test_hidden_shapes_are_those_of_the_model():
    _, params = jax.eval_shape(lambda: (0, make_model(MODEL_PRESETS["nano"], 0)[1]))
    of_model = sorted(
        leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"])
        if "kernel" in jax.tree_util.keystr(path)
    )
    assert sorted(hidden_shapes("nano").values()) == of_model


def test_contrib_is_amortised_from_two_kinds_of_steps():
    # Cold start, then refreshes at every second sample.
    row = step_time.sampled([9.0, 1.0, 11.0, 1.0, 13.0], gap=2, interval=4)
    assert row["cold_start_s"] == 9.0 and row["median_s"] == 1.0 and row["refresh_s"] == 12.0
    assert row["amortised_s"] == (12 + 3 * 1) / 4
    assert row["worst_to_median"] == 13.0 and row["worst_repeated_to_median"] == 11.0


def test_a_step_that_is_slow_once_is_not_repeated():
    row = step_time.timed([9.0, 1, 3, 1, 1, 7, 2, 1, 1], interval=4)
    assert row["cold_start_s"] == 9.0 and row["median_s"] == 1.0
    assert row["amortised_s"] == 17 / 8
    assert row["worst_s"] == 7.0 and row["worst_repeated_s"] == 2.0


def test_target_directions():
    assert target("", 1.0, 1.0)["met"] and not target("", 1.1, 1.0)["met"]
    assert target("", 0.996, 0.995, at_most=False)["met"]
    assert not target("", 0.99, 0.995, at_most=False)["met"]


@pytest.mark.parametrize("stacked", [False, True])
def test_step_time(tmp_path, stacked):
    step_time.main(
        preset="nano",
        layers=1,
        stacked=stacked,
        rank=8,
        interval=2,
        history=2,
        sample_every=1,
        share=not stacked,
        batch=1,
        length=8,
        rounds=2,
        copy_mib=1,
        output=tmp_path / "step_time.json",
    )
    results = json.loads((tmp_path / "step_time.json").read_text())
    assert results.keys() >= {"settings", "machine", "targets", "training_step", "samples_s"}
    assert results["environment"].keys() == ENVIRONMENT
    assert results["settings"]["matrices"] == 7 and results["settings"]["steps"] == 5
    names = {"adamw", "galore", "natural"} | (set() if stacked else {"contrib"})
    assert results["methods"].keys() == results["samples_s"].keys() == names
    for name, row in results["methods"].items():
        assert row.keys() >= METHOD and ("amortised_to_contrib" in row) == (not stacked)
        assert len(results["samples_s"][name]) == 5 and row["computed"] == (name == "contrib")
        expected = (
            row["bytes"] / results["machine"]["copy_bytes_per_s"]
            + row["operations"] / results["machine"]["product_operations_per_s"]
        )
        assert row["floor_s"] == pytest.approx(expected)
    assert len(results["targets"]) == (4 if stacked else 6)
    if stacked:
        return
    shares = results["training_step"]["methods"]
    assert shares.keys() == {"adamw", "galore", "natural"}
    assert all(0 < row["computed_share"] < row["share"] < 1 for row in shares.values())


def test_step_time_refuses_a_sample_that_misses_the_refresh():
    with pytest.raises(ValueError, match="interval=10 must be sample_every=4 times a number above"):
        step_time.main(interval=10, sample_every=4)


def test_per_layer(tmp_path):
    sizes = {"layers": 4, "vocab_size": 64, "batch_size": 1, "seq_len": 8}
    output = tmp_path / "per_layer.json"
    per_layer.main(
        preset="nano", **sizes, rank=8, optimizers=(), unstacked=("adamw",), output=output
    )
    results = json.loads(output.read_text())
    assert results["environment"].keys() == ENVIRONMENT
    assert {row["flags"] for row in results["steps"]} == results["flags"].keys()
    rows = [
        step_bytes(route, "galore", 8, "nano", sizes, steps=int(route == "per layer"))
        for route in ("ordinary", "per layer")
    ]
    for row in (*rows, *results["steps"]):
        assert row["layer_gradient_bytes"] == 4 * 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128)
        assert row["temporary_bytes"] > 0 and row["in_place_bytes"] <= row["state_bytes"]
    assert [len(row["step_s"]) for row in rows] == [0, 1]


TINY = {
    "presets": ("tiny",),
    "methods": ("adamw",),
    "seq_len": 8,
    "large_batch": 2,
    "timed": "tiny",
    "vocab_size": 300,
}


@pytest.mark.usefixtures("fast_compile")
def test_gpu_memory(tmp_path, monkeypatch):
    """The stages for a GPU run on a CPU, whose memory is not limited."""
    tasks = []

    def child(task, arguments, fraction):
        assert fraction is None
        tasks.append(task)
        return getattr(gpu_run, task)(**arguments)

    monkeypatch.setattr(gpu, "_child", child)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"It was on day {i} that the sea was calm." for i in range(4000)))
    output = tmp_path / "gpu_memory.json"
    with pytest.raises(SystemExit, match="error: no accelerator here; --estimate predicts"):
        gpu.main(**TINY, output=output)
    data = {"data": (str(text),), "cache_dir": tmp_path / "cache", "allow_cpu": True}
    results = gpu.main(**TINY, **data, steps=3, interval=2, output=output)
    assert json.loads(output.read_text()) == results
    assert results["measured_on"]["platform"] == "cpu" and not results["estimates_only"]
    steps = ("ordinary", "per layer", "remat", "per layer")
    for row, step in zip(results["steps"], steps, strict=True):
        assert row["step"] == step
        assert row["peak_bytes_in_use"] is None and row["tokens_per_second"] > 0
        # Of a model that knows nothing of its 1024 tokens, and changes.
        assert row["losses"] == pytest.approx([math.log(1024)] * 3, abs=0.1)
        assert len(set(row["losses"])) == 3
    assert results["update_s"]["adamw"]["median_s"] > 0
    # Stopped after two runs: a second start makes the others.
    output.write_text(json.dumps({**results, "steps": results["steps"][:2]}))
    again = gpu.main(**TINY, **data, steps=3, interval=2, output=output)
    assert tasks.count("train") == 4 + 2 and again["steps"][:2] == results["steps"][:2]
    # 24 GB of a device of 80 GB, of which 0.95 were found.
    assert gpu._fraction("24GB", 76 * 10**9) == pytest.approx(0.3)
    assert gpu._fraction("24GB", 16 * 10**9) is None


@pytest.mark.usefixtures("fast_compile")
def test_gpu_memory_estimates(tmp_path):
    output = tmp_path / "gpu_memory.json"
    sizes = {**TINY, "large_batch": 1}
    results = gpu.main(**sizes, limits=("10MB", "1kB"), estimate=True, output=output)
    assert results["estimates_only"] and results["measured_on"] is None
    for row in results["steps"]:
        assert row["estimated_to_fit"] == {"10MB": True, "1kB": False}
        assert "peak_bytes_in_use" not in row


def test_cases_of_gpu_memory():
    """A rank of the method's own is kept; weights in 8 bits have updates per layer alone."""
    methods = ("lean-natural-galore", "lean-natural-galore@rank=16,weight_bits=8")
    small = gpu.cases(("7b",), methods, ("sotu",), 256, 0, 10, [])
    found = [(case.step, parse(case.arguments)) for case in small]
    assert [(step, c.optimizer.rank, c.weight_bits) for step, c in found] == [
        ("ordinary", 256, None),
        ("per layer", 256, None),
        ("per layer", 16, 8),
    ]
    both = list(gpu.cases(("7b",), methods, ("sotu",), 256, 16, 10, []))
    assert [case.rows for case in both] == [1, 1, 1, 16, 16, 16]


def test_refresh(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"It was on day {i} that the sea was calm." for i in range(4000)))
    refresh.main(
        shape=(24, 40),
        rank=8,
        rounds=2,
        layers=1,
        steps=4,
        intervals=(2,),
        batch=1,
        stack=(3, 32, 48),
        history=2,
        data=DataConfig(data=(str(text),), vocab_size=300, cache_dir=tmp_path / "cache"),
        output=tmp_path / "refresh.json",
    )
    results = json.loads((tmp_path / "refresh.json").read_text())
    assert results["environment"].keys() == ENVIRONMENT
    time, energy, memory = (results[key] for key in ("time", "energy", "memory"))
    assert time["to_svd"]["svd"] == 1.0 and time["energy_to_svd"].keys() == time["median_s"].keys()
    assert time["energy_to_svd"]["eigh"] == pytest.approx(1.0, abs=1e-4)
    assert 0.5 < time["energy_to_svd"]["power"] <= 1.0 + 1e-6
    # 7 matrices; the first 4 are due at even steps, the others at odd ones.
    assert energy["cold"]["2"]["all"]["count"] == 7
    assert energy["warm"]["2"]["all"]["count"] == 3 + 4 + 3
    assert energy["warm"]["2"].keys() == {*"qkvo", "gate", "up", "down", "all"}
    assert all(0 < r["after"] <= 1 + 1e-6 for r in energy["refreshes"])
    assert all(r["after"] > r["before"] for r in energy["refreshes"] if r["step"] == 0)
    for row in memory["optimizers"].values():
        assert row["with_refresh_bytes"] - row["without_refresh_bytes"] == row["refresh_bytes"]
        assert row["without_refresh_bytes"] > 0
    assert [t["name"].split(",")[0] for t in results["targets"]] == [
        "warm refresh",
        "warm refresh",
        "largest entry of PᵀP − I",
        "energy / exact SVD",
        "galore",
        "natural",
    ]


def test_curvature(tmp_path, monkeypatch):
    few = {"adamw": lambda rate: optax.adamw(rate), "descent": lambda rate: optax.sgd(rate)}
    monkeypatch.setattr(curvature, "methods", lambda rank, interval: few)
    results = curvature.main(
        conditions=(1.0,),
        noises=(0.0,),
        rates=(0.01, 0.25, 1e3),
        steps=20,
        seeds=2,
        output=tmp_path / "curvature.json",
    )
    rows = results["problems"][0]["methods"]
    assert json.loads((tmp_path / "curvature.json").read_text())["problems"][0]["m"] == 64
    # All eigenvalues are 1, so that the gradient is 2 W: each step multiplies W by 1 - 2 rate.
    assert rows["descent"]["learning_rate"] == 0.25 and not rows["descent"]["at_edge"]
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 20, 0.1)
    shrunk = math.prod(float(1 - 0.5 * shape(t)) for t in range(20)) ** 2
    assert rows["descent"]["losses"] == pytest.approx([shrunk, shrunk], rel=1e-3)
    assert rows["adamw"]["mean"] < 1


def test_quantization(tmp_path):
    results = quantization.main(
        preset="60m",
        layers=1,
        rank=64,
        rounds=3,
        output=tmp_path / "quantization.json",
    )
    assert json.loads((tmp_path / "quantization.json").read_text()) == results
    cost = results["cost"]
    assert all(row["floor_s"] > 0 for row in cost.values())
    moved = {name: row["moved_bytes"] for name, row in cost.items()}
    assert moved["adam, 8 bits"] < moved["adam"] and moved["galore, 8 bits"] < moved["galore"]
    sizes = {name: row["state_bytes"] for name, row in cost.items()}
    for kind in "galore, {} basis", "history, {}":
        assert sizes[kind.format("int4")] < sizes[kind.format("int8")]
        assert sizes[kind.format("int8")] < sizes[kind.split(",")[0]]
    adam, small = results["cost"]["adam"], results["cost"]["adam, 8 bits"]
    assert 0.25 < small["state_bytes"] / adam["state_bytes"] < 0.26


def test_stages_on_a_gpu(tmp_path, monkeypatch, capsys):
    ran = tmp_path / "ran"
    command = [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('x'); print('said')"]

    child = tmp_path / "child"
    with_a_child = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid)); time.sleep(60)"
    )

    def stages(output, text):
        return [
            all_on_gpu.Stage("long", 9, command, [], []),
            all_on_gpu.Stage("bad", 1, [sys.executable, "-c", "raise SystemExit(3)"], [], []),
            all_on_gpu.Stage("good", 1, command, [], []),
            all_on_gpu.Stage("slow", 0.02, [sys.executable, "-c", with_a_child], [], []),
        ]

    real = all_on_gpu.stages(tmp_path, "sotu")
    assert {s.name for s in real} >= {"memory-7b-lean", "60m-adamw", "functions"}
    written = {word for s in real for word in s.command}
    assert not written & {str(tmp_path / f"{s.name}.json") for s in real}
    monkeypatch.setattr(all_on_gpu, "stages", stages)
    with pytest.raises(SystemExit, match="no accelerator"):
        all_on_gpu.main(output=tmp_path)
    for _ in range(2):
        assert all_on_gpu.main(minutes=2, allow_cpu=True, output=tmp_path) == 1
    assert ran.read_text() == "x"  # "good" once, "long" never
    records = {n: json.loads((tmp_path / f"{n}.json").read_text()) for n in ("bad", "good", "slow")}
    assert {name: r["exit_code"] for name, r in records.items()} == {
        "bad": 3,
        "good": 0,
        "slow": None,
    }
    assert records["good"]["last_lines"] == ["said"]
    # A stage out of time takes its children along; who has no parent may stay as a zombie.
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", child.read_text()], capture_output=True, text=True
    )
    assert state.stdout.strip()[:1] in ("", "Z")
    assert "long: left to the next start" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="only must name stages: long, bad, good, slow; got 'x'"):
        all_on_gpu.main(only=("x",))
