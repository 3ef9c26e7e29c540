"""Options of the planner: what is given is kept, what is not is chosen."""

import operator
import shlex

import pytest

from examples.common.cli import options_text
from examples.common.errors import ConfigError
from examples.llama.__main__ import parse
from examples.llama.plan.candidates import STEPS, PlanConfig, candidates
from examples.llama.run_config import run_preset

SMALL = shlex.split(
    "--model.hidden 16 --model.intermediate 24 --model.layers 2 --model.heads 2 --model.kv-heads 1 "
    "--vocab-size 280"
)


@pytest.mark.parametrize("size", ["3", "32"])
def test_a_batch_of_which_no_number_makes_the_step(size):
    given = [*SMALL, "--batch-size", size]
    message = f"divide the 16 rows of a step.*got {size}; what divides them is 1, 2, 4, 8, 16"
    with pytest.raises(ConfigError, match=message):
        list(candidates(PlanConfig(optimizers=("adamw",)), given))
    with pytest.raises(ConfigError, match=message):
        list(candidates(PlanConfig(optimizers=("adamw",), batch_sizes=(int(size),)), SMALL))
    (group,) = candidates(PlanConfig(optimizers=("adamw",)), [*given, "--accumulate", "2"])
    assert group[0].config.batch_size == int(size) and not group[0].larger


def test_options_of_the_program_hold_for_all_settings():
    given = [*SMALL, "--optimizer", "fira", "--rank", "4", "--batch-size", "8", "--per-layer"]
    (group,) = candidates(PlanConfig(dtype="float32"), given)
    (only,) = group
    assert only.config.accumulate == 2  # Of 8 rows, for the 16 of the preset.
    assert only.optimizer == "fira" and only.rank == 4
    assert only.config.batch_size == 8 and only.config.per_layer and only.config.model.stacked
    assert only.config.model.dtype == only.config.model.param_dtype == "float32"
    assert only.config.model.vocab_size == 280
    assert all(only.arguments.count(x) == 1 for x in ("--per-layer", "--rank", "--batch-size"))


def test_what_is_not_given_is_chosen():
    groups = list(candidates(PlanConfig(), ["--vocab-size", "280"]))
    assert {c.rank for group in groups for c in group} == {32, 16, None}  # The preset's, and half.
    for candidate in (c for group in groups for c in group):
        model = candidate.config.model
        assert model.stacked and model.dtype == model.param_dtype == "bfloat16"
        assert (candidate.config.batch_size, candidate.config.accumulate) == (1, 16)
        assert candidate.larger == ((2, 8), (4, 4), (8, 2), (16, 1))


_GIVEN = {
    "--model.dtype float32": {"model.dtype": "float32", "model.param_dtype": "float32"},
    "--bf16": {"model.dtype": "bfloat16", "model.param_dtype": "float32"},
    "--no-bf16": {"model.dtype": "float32", "model.param_dtype": "float32"},
    "--model.param_dtype=float32": {"model.dtype": "bfloat16", "model.param_dtype": "float32"},
    "--model.no-stacked": {"model.stacked": False, "per_layer": False},
    "--model.remat": {"model.remat": True},
    "--model.no-remat": {"model.remat": False},
    "--per-layer": {"per_layer": True, "model.stacked": True},
    "--no-per-layer": {"per_layer": False},
    "--weight-bits 8": {"weight_bits": 8, "per_layer": True},
    "--no_accumulate_in_subspace": {"accumulate_in_subspace": False},
    "--accumulate-in-subspace --residual=none": {"accumulate_in_subspace": True},
    "--rank 3": {"optimizer.rank": 3},
    "--moment-bits 8": {"optimizer.moment_bits": 8},
    "--moment-bits None": {"optimizer.moment_bits": None},
    "--residual fisher": {"optimizer.residual": "fisher"},
    "--batch_size 4": {"batch_size": 4, "accumulate": 4},
    "--accumulate 4": {"accumulate": 4},
    "--batch-size 5 --accumulate 3": {"batch_size": 5, "accumulate": 3},
    "--seq-len 8": {"seq_len": 8},
    "--sample=--hi": {"output.sample": "--hi"},
    "--clip-norm 2": {"optimizer.clip_norm": 2.0},
}


@pytest.mark.parametrize("given", _GIVEN)
def test_what_is_given_is_kept(given):
    optimizers = () if "--moment-bits" in given else ("natural-galore",)
    groups = list(candidates(PlanConfig(optimizers=optimizers), [*SMALL, *given.split()]))
    found = [candidate.config for group in groups for candidate in group]
    assert found
    for name, value in _GIVEN[given].items():
        assert {operator.attrgetter(name)(config) for config in found} == {value}


def test_a_rank_of_the_specification_is_the_only_one():
    (group,) = candidates(PlanConfig(optimizers=("galore@rank=4",)), SMALL)
    assert len({c.step for c in group}) == len(group) == 2 * len(STEPS)  # and low-rank sums
    assert all(c.rank == 4 and c.arguments.count("--rank") == 1 for c in group)


def test_what_a_file_gives_is_kept(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("model.stacked: false\nmodel.dtype: float32\nrank: 3\nmodel.remat: true\n")
    (group,) = candidates(PlanConfig(optimizers=("galore",)), [*SMALL, "--config", str(file)])
    for candidate in group:
        model = candidate.config.model
        assert candidate.rank == 3 and not model.stacked and model.remat
        assert model.dtype == model.param_dtype == "float32"
        assert parse(list(candidate.arguments)).model.layers == 2


@pytest.mark.parametrize(
    ("plan", "given"),
    [
        (PlanConfig(optimizers=("adamw",)), "--optimizer galore"),
        (PlanConfig(ranks=(4,)), "--rank 4"),
        (PlanConfig(batch_sizes=(4,)), "--batch-size 4"),
        (PlanConfig(dtype="float32"), "--model.dtype bfloat16"),
        (PlanConfig(dtype="float32"), "--bf16"),
        (PlanConfig(param_dtype="float32"), "--model.param-dtype bfloat16"),
    ],
)
def test_two_options_that_say_the_same(plan, given):
    with pytest.raises(ConfigError, match=f"and {given.split()[0]}: give one of the two"):
        list(candidates(plan, [*SMALL, *given.split()]))


def test_options_of_a_file_hold_too(tmp_path):
    file = tmp_path / "a plan.yaml"
    file.write_text("optimizer: adamw\nbatch-size: 8\naccumulate: 3\n")
    given = [*SMALL, "--config", str(file)]
    (group,) = candidates(PlanConfig(), given)
    assert [(c.optimizer, c.config.batch_size, c.config.accumulate) for c in group] == [
        ("adamw", 8, 3)
    ] * len(STEPS)
    assert not group[0].larger
    assert parse(shlex.split(group[0].command)[3:]) == parse(list(group[0].arguments))


def test_the_file_of_a_run_plans_that_run(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(options_text(run_preset("nano"), "examples.llama"))
    ((only,),) = candidates(PlanConfig(), ["--config", str(file)])
    assert only.config == parse(["--config", str(file)]) and only.step == "ordinary"


def test_a_plan_is_of_one_device():
    given = [*SMALL, "--distributed.devices", "--distributed.sharding", "full"]
    with pytest.raises(ConfigError, match="one device's memory: no --distributed"):
        list(candidates(PlanConfig(optimizers=("adamw",)), given))
