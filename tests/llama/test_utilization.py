"""Model-flops utilisation, from a table of peaks."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from examples.common.metrics import Record
from examples.llama.model.adapters import AdapterConfig
from examples.llama.model.config import MODEL_PRESETS, parameter_count
from examples.llama.report import describe
from examples.llama.run_config import run_preset
from examples.llama.training.utilization import flops_per_token, peak_flops, speed


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("TPU v5 lite", 197e12),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_the_first_words(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_flops_are_six_a_weight_and_attention():
    config = MODEL_PRESETS["60m"]
    # The table of tokens is looked up, norms are not products.
    products = parameter_count(config) - config.vocab_size * config.hidden
    products -= config.hidden * (2 * config.layers + 1)
    # Scores and weighted values: two products of T x head_dim for each head and token.
    attention = config.layers * 2 * config.hidden * 256
    assert flops_per_token(config, 256) == 6 * (products + attention)


def test_the_share_of_all_devices_is_recorded_where_it_is_known(monkeypatch):
    config = run_preset("60m")
    assert speed(config, 1e5) == {"tokens_per_second": 1e5}
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "local_devices", lambda: [device, device])
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    share = 1e5 * flops_per_token(config.model, 256) / 989e12
    assert speed(config, 1e5)["mfu"] == pytest.approx(share, abs=1e-4)
    many = dataclasses.replace(config.distributed, devices=True)
    found = speed(dataclasses.replace(config, distributed=many), 4e5)
    assert found["mfu"] == pytest.approx(share, abs=1e-4)
    lora = dataclasses.replace(config, adapter=AdapterConfig("lora"))
    assert "mfu" not in speed(lora, 1e5)
    record: Record = {"kind": "train", "loss": 2.0, "perplexity": 7.4, **speed(config, 1e5)}
    assert describe(record).endswith(f"100,000 tokens/s  {100 * record['mfu']:.1f} % of peak")
