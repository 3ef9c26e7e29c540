"""Accelerators: which jax is installed, and what programs say about devices."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from examples.common import accelerators
from examples.common.errors import ConfigError
from examples.llama.run_config import run_preset
from examples.llama.training.build import on_the_host

ROOT = Path(__file__).parent.parent


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine whose nvidia-smi lists what the test says."""

    def install(output: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(accelerators, "TPU_FILES", (str(tmp_path / "accel[0-9]*"),))
    install("no devices were found", 6)
    return install


def installed(tmp_path, *variables) -> list[str]:
    """The extras that make would install."""
    command = ["make", "-n", "setup", f"VENV={tmp_path / 'venv'}", *variables]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return re.findall(r"-e '\.(.*)'", made.stdout)


@pytest.mark.parametrize(
    ("output", "code", "is_there"),
    [
        ("GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)", 0, True),
        ("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost", 15, False),
        ("Unable to determine the device handle for GPU 0000:01:00.0\nGPU 1: H100", 15, True),
        ("No devices were found: is there a GPU?", 0, False),
    ],
)
def test_make_and_programs_agree_on_a_gpu(nvidia_smi, tmp_path, output, code, is_there):
    nvidia_smi(output, code)
    assert (installed(tmp_path, f"TPU_FILES={tmp_path}/accel*")[0] == "[cuda]") == is_there
    assert (accelerators.unused_accelerator() is not None) == is_there


def test_make_installs_jax_for_what_is_there(nvidia_smi, tmp_path):
    no_tpu = f"TPU_FILES={tmp_path}/accel*"
    assert installed(tmp_path, no_tpu) == ["", "[examples,hub]", "[dev]"]
    nvidia_smi("GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)")
    assert installed(tmp_path, no_tpu)[0] == "[cuda]"
    assert installed(tmp_path, no_tpu, "DEVICE=cpu")[0] == ""
    nvidia_smi("no devices were found", 6)
    (tmp_path / "accel0").touch()
    assert installed(tmp_path, no_tpu)[0] == "[tpu]"


def test_make_has_a_line_before_each_installation(tmp_path):
    """Installations are quiet and take minutes."""
    command = ["make", "-n", "setup", "functions", f"VENV={tmp_path / 'venv'}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = made.stdout.splitlines()
    first = [i for i, line in enumerate(lines) if "pip install" in line and " -e " in line]
    assert len(first) >= 4
    assert all(lines[i - 1].startswith("echo ") for i in first)


def test_the_list_of_commands_fits_a_terminal():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = listed.stdout.splitlines()
    assert len(lines) >= 18 and max(map(len, lines)) <= 80


def test_make_refuses_another_device(tmp_path):
    command = ["make", "-n", "setup", "DEVICE=gpu"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and 'cpu, cuda or tpu, got "gpu"' in made.stderr


def test_an_unused_accelerator_is_a_warning(nvidia_smi, tmp_path, monkeypatch, capsys):
    notes = []
    accelerators.announce_devices(notes.append)
    assert notes == [f"devices: {jax.device_count()} x cpu"] and capsys.readouterr().err == ""
    nvidia_smi("GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)")
    accelerators.announce_devices(notes.append)
    error = capsys.readouterr().err
    assert error.startswith("warning: this machine has a GPU") and "DEVICE=cuda" in error
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # Asked for.
    assert accelerators.unused_accelerator() is None
    monkeypatch.delenv("JAX_PLATFORMS")
    nvidia_smi("", 6)
    assert accelerators.unused_accelerator() is None
    (tmp_path / "accel0").touch()
    assert "has a TPU" in (accelerators.unused_accelerator() or "")


def test_devices_are_on_stderr_where_the_output_is_a_result(nvidia_smi, capsys):
    nvidia_smi("GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)")
    accelerators.announce_devices()
    printed = capsys.readouterr()
    devices, warning = printed.err.splitlines()
    assert printed.out == "" and devices == f"devices: {jax.device_count()} x cpu"
    assert warning.startswith("warning: this machine has a GPU")


def test_idle_devices_are_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    accelerators.announce_devices(lambda text: None, used=1)
    assert "7 of 8 devices are idle" in capsys.readouterr().err
    accelerators.announce_devices(lambda text: None)
    assert capsys.readouterr().err == ""


ASKED = {
    "nonsense": RuntimeError("Unable to initialize backend 'nonsense'"),
    "cuda": AssertionError(),  # What jax raises where no GPU is visible.
    "": RuntimeError("Unable to initialize backend 'cuda': a plugin\nthat fails"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_without_devices_an_error_says_what_was_asked_and_what_is_there(asked, monkeypatch):
    found = jax.devices()

    def devices():
        if jax.config.jax_platforms == asked:
            raise ASKED[asked]
        return found

    monkeypatch.setattr(jax, "devices", devices)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", asked)
    try:
        with pytest.raises(ConfigError) as raised:
            accelerators.announce_devices(lambda text: None)
        assert jax.config.jax_platforms == asked
    finally:
        jax.config.update("jax_platforms", before)
    message = str(raised.value)
    assert (str(ASKED[asked]) or "none is visible").splitlines()[0] in message
    assert "\n" not in message
    if asked:
        assert message.startswith(f"JAX_PLATFORMS={asked}: no such device")
        assert message.endswith(f"without JAX_PLATFORMS there is {len(found)} x cpu")


def test_programs_end_with_one_line_where_the_platform_is_not_there():
    environment = os.environ | {"JAX_PLATFORMS": "nonsense", "PYTHONPATH": str(ROOT)}
    for words in ("llama", "llama.export x --to y", "many_devices.replicated"):
        command = [sys.executable, "-m", *f"examples.{words}".split()]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 1, ended.stderr
        (line,) = ended.stderr.splitlines()
        assert line.startswith("error: JAX_PLATFORMS=nonsense: no such device")


def test_weights_in_8_bits_need_the_processor_beside_an_accelerator(monkeypatch):
    def no_processor(backend=None):
        raise RuntimeError("Unknown backend cpu")

    config = dataclasses.replace(
        run_preset("nano"),
        weight_bits=8,
        per_layer=True,
        model=dataclasses.replace(run_preset("nano").model, stacked=True),
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", no_processor)
    with pytest.raises(ConfigError, match=r"JAX_PLATFORMS=.*leaves out: add cpu"):
        on_the_host(config)


def test_hints_name_pinned_packages():
    """Packages that errors tell users to install are on the index, or in the clone."""
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    hints = [
        (path, hint)
        for path in (ROOT / "examples").rglob("*.py")
        for hint in re.findall(r"python -m pip install ((?:[\w.-]+ ?)+)\"", path.read_text())
    ]
    assert len(hints) >= 4
    for path, hint in hints:
        for name in hint.split():
            assert f"{name.lower().replace('_', '-')}==" in pins, (path, name)
    texts = "".join(path.read_text() for path in (ROOT / "examples").rglob("*.py"))
    assert "natgalore-jax[" not in texts
