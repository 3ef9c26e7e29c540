"""examples/minimal.py at a tiny size: it learns, resumes exactly, and shards over devices."""

import ast
import dataclasses
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

import natgalore_jax as ng
from examples import minimal
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import with_params

pytestmark = pytest.mark.usefixtures("fast_compile")

TEXT = b"The quick brown fox jumps over the lazy dog. " * 100
TOKENS = np.frombuffer(TEXT, np.uint8)

# On several devices sums have another order, in float32 of 24 bits, and Adam divides by its second
# moments, which amplifies small differences where they are small (tests/test_many_devices.py).
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Tiny(minimal.Config):
    width: int = 16
    mlp_width: int = 24
    heads: int = 2
    layers: int = 2
    context: int = 16
    steps: int = 12
    rank: int = 4
    update_interval: int = 4
    log_every: int = 1
    checkpoint_every: int = 6
    eval_batches: int = 2


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])


def train(out, devices, **changes):
    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        return minimal.train(Tiny(**changes), TOKENS, out, mesh)


@pytest.fixture(scope="module")
def uninterrupted(fast_compile, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, *train(out, devices=1)


@pytest.fixture
def stopped(uninterrupted, tmp_path):
    """The directory of the same run, stopped after its checkpoint at step 6."""
    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "12")
    return tmp_path


def test_the_loss_falls(uninterrupted):
    _, _, losses = uninterrupted
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_is_bitwise_equal(uninterrupted, stopped):
    _, params, losses = uninterrupted
    resumed_params, resumed_losses = train(stopped, devices=1)
    assert resumed_losses == losses[6:]
    jax.tree.map(np.testing.assert_array_equal, resumed_params, params)


def test_four_devices_have_the_losses_of_one(uninterrupted, tmp_path):
    params, losses = train(tmp_path, devices=4)
    np.testing.assert_allclose(losses, uninterrupted[2], rtol=TOLERANCE)
    up = params["blocks"][0]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (16, 6)


def test_a_run_resumes_on_another_number_of_devices(uninterrupted, stopped):
    _, losses = train(stopped, devices=4)
    np.testing.assert_allclose(losses, uninterrupted[2][6:], rtol=TOLERANCE)


def test_the_optimizer_projects_the_matrices_of_the_blocks(uninterrupted):
    with jax.set_mesh(mesh_of(1)):
        report = ng.memory_report(minimal.make_optimizer(Tiny()), uninterrupted[1])
    for parameter in report.parameters:
        in_a_block = parameter.path.startswith("blocks/") and parameter.path.endswith("/kernel")
        assert parameter.projected == in_a_block, parameter.path


@pytest.mark.slow
def test_the_model_is_a_llama(uninterrupted):
    """The logits of examples/llama with the same weights."""
    params, tiny = uninterrupted[1], Tiny()
    config = ModelConfig(
        vocab_size=tiny.vocab_size,
        hidden=tiny.width,
        intermediate=tiny.mlp_width,
        layers=tiny.layers,
        heads=tiny.heads,
        kv_heads=tiny.heads,
        max_length=tiny.context,
    )
    rows = TOKENS[: 2 * tiny.context].reshape(2, -1).astype(np.int32)
    with jax.set_mesh(mesh_of(1)):
        logits = jax.jit(minimal.apply, static_argnums=2)(params, rows, tiny)
    renamed = jax.device_get({**params, "layers": params["blocks"]})
    del renamed["blocks"]
    np.testing.assert_allclose(logits, with_params(config, renamed)(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_program(tmp_path, monkeypatch, capsys):
    """On all simulated devices; a second call finds the run finished and writes a sample again."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(TEXT)
    monkeypatch.setattr(minimal, "Config", Tiny)
    arguments = ["minimal.py", "--text", str(text), "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    minimal.main()
    first = capsys.readouterr().out
    assert "step     2  held-out loss" in first and "AdamW's" in first
    minimal.main()
    second = capsys.readouterr().out
    devices, resumed, rest = second.split("\n", 2)
    assert devices == f"devices: {jax.device_count()} x cpu" and first.startswith(devices)
    assert resumed == "resume from step 2 of 2" and first.endswith(rest)
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "1"])
    with pytest.raises(SystemExit, match="2 are done, got 1"):
        minimal.main()
    monkeypatch.setattr(sys, "argv", arguments)
    text.write_bytes(TEXT[::-1])  # Another text is no finished run.
    minimal.main()
    assert "step     2  held-out loss" in capsys.readouterr().out


def test_a_text_that_is_too_short_ends_before_training(tmp_path):
    """The held-out twentieth of 320 bytes has no row of 16 + 1."""
    with pytest.raises(SystemExit, match="--text: needs 321 bytes, got 320"):
        minimal.train(Tiny(), TOKENS[:320], tmp_path / "out", mesh_of(1))
    assert not (tmp_path / "out").exists()


def test_devices_that_cannot_share_a_batch_end_before_training(tmp_path):
    with pytest.raises(SystemExit, match="3 devices cannot share the 8 rows"):
        minimal.train(Tiny(), TOKENS, tmp_path / "out", mesh_of(3))
    assert not (tmp_path / "out").exists()


def test_it_is_one_short_file_that_stands_alone():
    source = pathlib.Path(minimal.__file__).read_text()
    assert len(source.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
    packages = {"flax", "jax", "natgalore_jax", "numpy", "optax", "orbax"}
    assert imported <= packages | sys.stdlib_module_names


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_text_that_cannot_be_read_is_an_error_of_one_line(tmp_path, name):
    with pytest.raises(SystemExit, match=rf"^--text: .*{tmp_path}"):
        minimal.load_tokens(tmp_path / name)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--out", __file__]])
def test_a_run_has_steps_and_a_directory(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minimal.py", *arguments])
    with pytest.raises(SystemExit):
        minimal.main()
    assert "--steps must be at least 1, and --out a directory" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_not_saved(fast_compile, tmp_path):
    with pytest.raises(SystemExit, match="not saved: try a lower learning rate"):
        train(tmp_path, devices=1, learning_rate=1e30)
    assert not [path for path in tmp_path.iterdir() if path.name.isdigit()]
