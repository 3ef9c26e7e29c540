"""Share of the optimizer in the time of a training step."""

import dataclasses
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import optax

from benchmarks.common.timing import Updater, seconds
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.training.train_step import make_model, token_nll
from examples.llama.training.utilization import flops_per_token


def training_share(
    methods: dict[str, Callable[[], optax.GradientTransformation]],
    preset: str,
    layers: int | None,
    batch: int,
    length: int,
    scaled_tokens: int,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """Time of forward and backward pass and of the updates of all parameters, interleaved.

    Args:
      methods: factories of the optimizers; embedding and head are theirs too.
      preset, layers: the model; None is all of its layers.
      batch, length: rows and tokens in a row of the measured batch, made of random tokens.
      scaled_tokens: the tokens of a step whose share is computed from the measured time, in
        proportion to the operations of both.
      rounds: how many times each is run; the first is not counted.
      seed: of parameters and tokens.
    """
    config = MODEL_PRESETS[preset]
    config = dataclasses.replace(config, layers=layers or config.layers)
    apply, params = make_model(config, seed)
    rows = jax.random.randint(jax.random.key(seed), (batch, length + 1), 0, config.vocab_size)
    loss = jax.value_and_grad(lambda p, rows: token_nll(apply, p, rows).mean())
    forward_backward = jax.jit(loss).lower(params, rows).compile()
    _, grads = forward_backward(params, rows)
    updaters = {name: Updater(make(), grads, params) for name, make in methods.items()}

    samples: list[float] = []
    for _ in range(rounds):
        samples.append(seconds(forward_backward, params, rows))
        for updater in updaters.values():
            updater.step(grads, params)
    passes = median(samples[1:])
    tokens = batch * length
    scaled = passes * scaled_tokens / tokens
    operations = tokens * flops_per_token(config, length)
    result: dict[str, Any] = {
        "preset": preset,
        "layers": config.layers,
        "batch": batch,
        "length": length,
        "tokens": tokens,
        "forward_backward_s": passes,
        "forward_backward_operations": operations,
        "computed_tokens": scaled_tokens,
        "computed_forward_backward_s": scaled,
        "samples_s": {"forward_backward": samples},
        "methods": {},
    }
    for name, updater in updaters.items():
        update = median(updater.samples[1:])
        result["samples_s"][name] = updater.samples
        result["methods"][name] = {
            "update_s": update,
            "share": update / (update + passes),
            "computed_share": update / (update + scaled),
        }
    return result


def print_share(result: dict[str, Any]) -> None:
    print(
        f"\nShare of the update in a training step of {result['preset']}, all parameters: forward "
        f"and backward pass of {result['batch']} x {result['length']} tokens "
        f"{result['forward_backward_s']:.2f} s;\nfor {result['computed_tokens']} tokens computed "
        f"from operations: {result['computed_forward_backward_s']:.0f} s"
    )
    for name, row in result["methods"].items():
        print(
            f"  {name:10}update {1e3 * row['update_s']:7.1f} ms   share {row['share']:6.1%}   "
            f"computed for {result['computed_tokens']} tokens {row['computed_share']:.2%}"
        )
