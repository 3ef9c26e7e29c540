"""Model-flops utilisation: the share of a device's peak that the model's own arithmetic takes."""

import re

import jax

from examples.llama.model.config import ModelConfig
from examples.llama.run_config import RunConfig

# Dense products in bfloat16, in flop/s of one device, from the vendors' data sheets; by
# first words of `device_kind`.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Of a device, None if it is not in the table. The longest name that fits counts."""
    known = [kind for kind in PEAK_FLOPS if re.match(rf"{kind}\b", device.device_kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Of a forward and a backward pass, 2 and 4 for each weight of a product.

    Attention counts as if it were not causal, and what is computed again not at all, as in
    Chowdhery et al., "PaLM", 2022, appendix B. The optimizer is not counted.
    """
    c = model
    attention = 2 * c.hidden * c.head_dim * (c.heads + c.kv_heads)
    layer = attention + 3 * c.hidden * c.intermediate
    weights = c.layers * layer + c.hidden * c.vocab_size
    return 6 * weights + 12 * c.layers * c.heads * c.head_dim * seq_len


def speed(config: RunConfig, tokens_per_second: float) -> dict[str, float]:
    """Metrics of a step: tokens a second, and "mfu" where the peak of the devices is known."""
    metrics = {"tokens_per_second": round(tokens_per_second, 1)}
    devices = jax.devices() if config.distributed.enabled else jax.local_devices()[:1]
    peak = peak_flops(devices[0])
    # Adapters have fewer gradients than weights.
    if peak is not None and config.adapter.kind == "none":
        flops = tokens_per_second * flops_per_token(config.model, config.seq_len)
        metrics["mfu"] = round(flops / (peak * len(devices)), 4)
    return metrics
