"""Memory of a compiled training step of ``examples/llama``."""

import dataclasses
import time
from typing import Any, cast

import jax
import jax.numpy as jnp

from examples.common.train_state import init_state, updated
from examples.llama.memory.step_memory import temporary_bytes
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.run_config import RunConfig, run_preset
from examples.llama.training.build import abstract_run
from examples.llama.training.train_step import make_model, token_nll
from natgalore_jax._src.memory.compiled_step import bytes_per_device


def step_bytes(
    route: str, optimizer: str, rank: int, preset: str, sizes: dict[str, int], steps: int
) -> dict[str, Any]:
    """Bytes that XLA reserves for a step, and processor seconds that steps take.

    Args:
      route: "ordinary", "per layer", "per layer, 8 bits" (of weights, moments and bases) or
        "unstacked".
      optimizer, rank: as on the command line of ``examples.llama``.
      preset, sizes: the model; layers, vocab_size, batch_size and seq_len are the sizes.
      steps: how many are timed, after one that is not; 0 runs none.
    """
    config = _config(route, optimizer, rank, preset, **sizes)
    run = abstract_run(config)
    if route == "unstacked":
        step = jax.jit(_step_without_norm(run.apply, run.tx), donate_argnums=0)
        compiled = step.lower(run.state, run.rows).compile()
    else:
        compiled = run.compile()
    return {
        "temporary_bytes": temporary_bytes(compiled),
        "state_bytes": bytes_per_device(run.state),
        "in_place_bytes": cast(Any, compiled.memory_analysis()).alias_size_in_bytes,
        "layer_gradient_bytes": bytes_per_device(
            jax.eval_shape(lambda state: state.float_params["layers"], run.state)
        ),
        "step_s": _seconds(compiled, config, run.tx, steps) if steps else [],
    }


def _config(
    route: str,
    optimizer: str,
    rank: int,
    preset: str,
    layers: int,
    vocab_size: int,
    batch_size: int,
    seq_len: int,
) -> RunConfig:
    model = dataclasses.replace(
        MODEL_PRESETS[preset],
        layers=layers,
        vocab_size=vocab_size,
        max_length=seq_len,
        stacked=route != "unstacked",
        remat=True,
    )
    config, in_8_bits = run_preset(preset), route == "per layer, 8 bits"
    return dataclasses.replace(
        config,
        model=model,
        batch_size=batch_size,
        seq_len=seq_len,
        per_layer=route.startswith("per layer"),
        weight_bits=8 if in_8_bits else None,
        optimizer=dataclasses.replace(
            config.optimizer,
            name=optimizer,
            rank=rank,
            moment_bits=8 if in_8_bits else None,
            basis_dtype="int8" if in_8_bits else None,
        ),
    )


def _step_without_norm(apply: Any, tx: Any) -> Any:
    """A step that nothing makes wait for all gradients, not even to measure their norm."""

    def step(state, rows):
        def mean_nll(params):
            return token_nll(apply, params, rows).mean()

        loss, grads = jax.value_and_grad(mean_nll)(state.params)
        return updated(state, tx, grads, {"loss": loss, "grad_norm": jnp.zeros([])})

    return step


def _seconds(compiled: Any, config: RunConfig, tx: Any, steps: int) -> list[float]:
    """Times of the processor, over all threads."""
    _, params = make_model(config.model, config.seed)
    state = jax.jit(lambda params: init_state(params, tx, weight_bits=config.weight_bits))(params)
    rows = jnp.zeros((config.batch_size, config.seq_len + 1), jnp.int32)
    times = []
    for _ in range(steps + 1):
        start = time.process_time()
        state, metrics = compiled(state, rows)
        jax.block_until_ready((state, metrics))
        times.append(time.process_time() - start)
    return times[1:]
