"""python -m natgalore_jax."""

import dataclasses
import json
import re

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
from natgalore_jax._src.memory.shapes_file import read_shapes

METHODS = (
    "AdamW",
    "GaLore",
    "Natural GaLore",
    "Natural GaLore, history of 10",
    "Natural GaLore, 8 bits",
)


def states(output):
    """Sizes of the state by optimizer, from the table."""
    rows = [re.split(r"  +", line) for line in output.splitlines()]
    return {row[0]: row[4] for row in rows if row[0] in METHODS and len(row) == 7}


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


def test_without_devices_it_says_why(capsys, monkeypatch):
    def no_backend():
        raise RuntimeError("no backend here")

    monkeypatch.setattr(jax, "devices", no_backend)
    main([])
    assert "none, no backend here" in capsys.readouterr().out


def test_table_of_a_preset_is_that_of_the_readme(capsys):
    """The README has 0.232, 0.164, 0.164, 0.290 and 0.087 GB, counted on the Flax model."""
    main(["--preset", "60m"])
    output = capsys.readouterr().out
    sizes = ("232 MB", "164 MB", "164 MB", "290 MB", "87.2 MB")
    assert states(output) == dict(zip(METHODS, sizes, strict=True))
    assert "58,073,600 parameters; rank 128, side auto" in output


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


def test_shapes_from_a_file(tmp_path, capsys):
    file = tmp_path / "shapes.json"
    file.write_text(
        json.dumps(
            {
                "mlp": {"up": [64, 256], "scale": {"shape": [], "dtype": "bfloat16"}},
                "shape": {"shape": [4]},
            }
        )
    )
    tree = jax.tree.map(lambda x: (x.shape, str(x.dtype)), read_shapes(file, "float16"))
    assert tree == {
        "mlp": {"up": ((64, 256), "float16"), "scale": ((), "bfloat16")},
        "shape": ((4,), "float16"),
    }
    main(["--shapes", str(file), "--rank", "8", "--dtype", "bfloat16", "--side", "left"])
    # By hand: basis 64 · 8 and two moments of 8 · 256 numbers; 5 more numbers, two moments each.
    assert states(capsys.readouterr().out)["GaLore"] == "9.24 kB"
    assert 2 * (64 * 8 + 2 * 8 * 256 + 2 * 5) + 8 == 9244


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[[2, 3]]", r"an object of names and shapes is required, got \[\[2, 3\]\]"),
        ("{}", "at least one parameter is required, got {}"),
        ('{"a": {"w": [2, 0]}}', r"a/w: a shape is a list of positive integers.*got \[2, 0\]"),
        ('{"a": [true]}', r"a: a shape is .*got \[true\]"),
        ('{"a": "2x3"}', 'a: a shape is .*got "2x3"'),
        ('{"a": [2], "a": [3]}', "keys must be unique, duplicate key: 'a'"),
        ('{"a": {"shape": [2], "dtype": "int8"}}', 'a: dtype must be one of float32.*got "int8"'),
        ('{"a": {"shape": [2], "size": 2}}', "a has a shape and, at most, a dtype; got size"),
        ('{"w": [8, 8]}', "where selects no parameter to project at rank 128"),
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "shapes.json"
    file.write_text(content)
    assert re.search(message, rejected(capsys, "--shapes", str(file)))


def test_bad_options_are_one_line(tmp_path, capsys):
    assert "No such file" in rejected(capsys, "--shapes", str(tmp_path / "none.json"))
    assert "--rank needs a model" in rejected(capsys, "--rank", "8")
    assert "a positive integer, got '0'" in rejected(capsys, "--preset", "60m", "--rank", "0")
    assert "invalid choice: '3b'" in rejected(capsys, "--preset", "3b")
    both = rejected(capsys, "--preset", "60m", "--shapes", "x.json")
    assert "not allowed with argument" in both
