"""python -m natgalore_jax."""

import dataclasses
import io
import re
import sys

import jax
import optax
import pytest
from flax import nnx

import natgalore_jax as ng
from examples.llama.model.config import MODEL_PRESETS, ModelConfig
from examples.llama.model.llama import Llama
from examples.llama.run_config import RUN_PRESETS
from natgalore_jax.__main__ import main
from natgalore_jax._src.memory.llama_sizes import LLAMA_RANKS, LLAMA_SIZES, LlamaSizes, llama_shapes

METHODS = (
    "AdamW",
    "GaLore",
    "Natural GaLore",
    "history of 10",
    "8 bits",
    "lean, rank 32",
)


def states(output):
    """Sizes of the state by optimizer, from the table."""
    rows = [re.split(r"  +", line.strip()) for line in output.splitlines()]
    return {row[0]: row[4] for row in rows if row[0] in METHODS and len(row) == 7}


def test_lines_fit_a_terminal(capsys):
    main(["--preset", "7b"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    treatment = next(
        i for i, line in enumerate(lines) if line.split()[:2] == ["parameter", "count"]
    )
    sizes = next(i for i, line in enumerate(lines) if line.split()[:2] == ["parameter", "weights"])
    names = [[line.split()[0] for line in lines[i + 1 : i + 8]] for i in (treatment, sizes)]
    assert names[0] == names[1] and lines[sizes + 9].startswith("total")


def test_a_terminal_without_all_characters(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    main([])
    terminal.flush()
    assert b" ? cpu" in terminal.buffer.getvalue()


def rejected(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_versions_and_devices(capsys):
    main([])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["natgalore_jax"] == ng.__version__
    assert (lines["jax"], lines["optax"]) == (jax.__version__, optax.__version__)
    assert lines["devices"] == f"{jax.device_count()} × cpu"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no backend here"), "no backend here"),
        (AssertionError(), "JAX_PLATFORMS asks for GPUs, and none is visible"),
    ],
)
def test_without_devices_it_says_why(capsys, monkeypatch, error, reason):
    def no_backend():
        raise error

    monkeypatch.setattr(jax, "devices", no_backend)
    main([])
    assert f"none, {reason}" in capsys.readouterr().out


def test_table_of_a_preset(capsys):
    """Counted on the Flax model too: docs/memory.md."""
    main(["--preset", "60m"])
    output = capsys.readouterr().out
    sizes = ("232 MB", "164 MB", "164 MB", "290 MB", "87.2 MB", "37.9 MB")
    assert states(output) == dict(zip(METHODS, sizes, strict=True))
    assert "58,073,600 parameters; rank 128, side short" in output


def test_options_of_the_model_reach_the_table(capsys):
    """In float32 the two moments of AdamW have twice the bytes."""
    main(["--preset", "60m", "--rank", "64", "--dtype", "float32", "--side", "both"])
    output = capsys.readouterr().out
    assert states(output)["AdamW"] == "465 MB"
    assert "  lean, rank 16  " in output
    assert "rank 64, side both" in output


def test_shapes_of_a_llama_are_those_of_the_model():
    sizes = LlamaSizes(64, 32, 48, layers=3, heads=4, kv_heads=2)
    config = ModelConfig(**sizes._asdict(), max_length=8, stacked=True, param_dtype="bfloat16")
    model = nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(model))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), llama_shapes(sizes, "bfloat16")) == shapes


def test_presets_are_those_of_the_example():
    for name, sizes in LLAMA_SIZES.items():
        config = dataclasses.asdict(MODEL_PRESETS[name])
        assert {field: config[field] for field in sizes._fields} == sizes._asdict()
        assert RUN_PRESETS[name]["optimizer"].rank == LLAMA_RANKS[name]


def test_bad_options_are_one_line(capsys):
    assert "--rank needs a model" in rejected(capsys, "--rank", "8")
    assert "a positive integer, got '0'" in rejected(capsys, "--preset", "60m", "--rank", "0")
    too_high = rejected(capsys, "--preset", "60m", "--rank", "9999")
    assert "where selects no parameter to project at rank 9999" in too_high
    assert "invalid choice: '3b'" in rejected(capsys, "--preset", "3b")
