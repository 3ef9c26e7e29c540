"""Gain of second-order information on quadratic losses of known curvature.

``python -m benchmarks.optimizer.curvature`` minimises ½ tr((W − W*)ᵀ A (W − W*)) + ½ tr((W − W*) B
(W − W*)ᵀ) over an m × n matrix W. A and B have random eigenvectors and eigenvalues that are evenly
spaced in their logarithm, from 1 down to one over the condition number. Noise of independent normal
entries is added to each gradient. Every method has the same grid of peak learning rates, a warm-up
over the first tenth of the steps and a cosine to a tenth, and its rate is the one with the least
final loss on seeds that are not used again. Reported is the loss at the end over the loss at the
beginning: the geometric mean over the other seeds, and the standard deviation of its logarithm.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, write_results
from benchmarks.common.result_files import write
from benchmarks.pretraining.variants import recipe

# Losses are float32: what is smaller is zero.
_SMALLEST = 1e-38

Factory = Callable[[optax.Schedule], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A quadratic loss and how it is minimised."""

    condition: float  # the largest over the smallest eigenvalue of A and of B
    noise: float  # standard deviation of an entry, over that of the first gradient
    m: int = 64
    n: int = 96
    steps: int = 400


def methods(rank: int, interval: int) -> dict[str, Factory]:
    """The compared optimizers. Without Fisher matrices everything else is as in the default."""
    subspace: dict[str, Any] = {"rank": rank, "update_interval": interval}
    paper = functools.partial(ng.paper_natural_galore_adamw, scale=0.25, **subspace)
    default = functools.partial(ng.natural_galore_adamw, **subspace)
    return {
        "adamw": functools.partial(optax.adamw, weight_decay=0.0),
        "galore": functools.partial(ng.galore_adamw, scale=0.25, **subspace),
        "fira": functools.partial(ng.galore_adamw, scale=0.25, residual="fira", **subspace),
        "natural-galore, paper": paper,
        "natural-galore, default": default,
        "a history of 10 inside": functools.partial(recipe, history=10, damping=1.0, **subspace),
        # Relative: far above all its entries.
        "without the Fisher matrix inside": functools.partial(recipe, damping=1e6, **subspace),
        "without the Fisher matrix outside": functools.partial(default, residual="fira"),
        "without either": functools.partial(recipe, damping=1e6, residual="fira", **subspace),
    }


def spectrum(key: jax.Array, size: int, condition: float) -> jax.Array:
    """A symmetric matrix with eigenvalues from 1 / condition to 1."""
    Q = jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]
    return (Q * jnp.logspace(-math.log10(condition), 0, size)) @ Q.T


def make_run(problem: Problem, factory: Factory) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A jitted ``(peak learning rate, seed) -> final loss over the first``."""

    @jax.jit
    def run(rate: jax.Array, seed: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(seed), 4)
        A = spectrum(keys[0], problem.m, problem.condition)
        B = spectrum(keys[1], problem.n, problem.condition)
        params = {"w": jax.random.normal(keys[2], (problem.m, problem.n))}

        def loss(params):
            E = params["w"]
            return 0.5 * (jnp.vdot(E, A @ E) + jnp.vdot(E, E @ B))

        warmup = problem.steps // 10
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, problem.steps, 0.1)
        tx = factory(lambda count: rate * shape(count))
        first = loss(params)
        scale = problem.noise * jnp.std(jax.grad(loss)(params)["w"])

        def step(carry, key):
            params, state = carry
            G = jax.grad(loss)(params)
            G = jax.tree.map(lambda g: g + scale * jax.random.normal(key, g.shape), G)
            updates, state = tx.update(G, state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = jax.random.split(keys[3], problem.steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), steps)
        return loss(params) / first

    return run


def compare(
    problem: Problem, rank: int, interval: int, rates: tuple[float, ...], tune: int, seeds: int
) -> dict[str, Any]:
    """Each method at its best rate; the first ``tune`` seeds choose it, the next are reported."""
    rows = {}
    for name, factory in methods(rank, interval).items():
        run = make_run(problem, factory)

        def losses(rate: float, which: range, run=run) -> list[float]:
            return [float(run(jnp.float32(rate), jnp.int32(seed))) for seed in which]

        tuning = {rate: _log_mean(losses(rate, range(tune))) for rate in rates}
        best = min(tuning, key=tuning.__getitem__)
        final = losses(best, range(tune, tune + seeds))
        rows[name] = {
            "learning_rate": best,
            "at_edge": best in (min(rates), max(rates)),
            "tuning_log_losses": tuning,
            "losses": final,
            "mean": math.exp(_log_mean(final)),
            "log_std": _log_std(final),
        }
    return rows


def _log_mean(losses: list[float]) -> float:
    """Mean of the logarithms; infinite if a loss is non-finite."""
    if not all(map(math.isfinite, losses)):
        return math.inf
    return statistics.fmean(math.log(max(x, _SMALLEST)) for x in losses)


def _log_std(losses: list[float]) -> float | None:
    """None for one loss, and if one of them is not finite."""
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return None
    return statistics.stdev(math.log(max(x, _SMALLEST)) for x in losses)


def main(
    conditions: tuple[float, ...] = (10.0, 1e4),
    noises: tuple[float, ...] = (0.0, 1.0),
    rank: int = 16,
    interval: int = 50,
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    tune: int = 1,
    seeds: int = 3,
    steps: int = 400,
    output: Path = RESULTS / "curvature.json",
) -> dict[str, Any]:
    """Compare optimizers on quadratic losses.

    Args:
      conditions: condition numbers.
      noises: standard deviations of the noise over that of the first gradient.
      rank: of the subspaces.
      interval: between refreshes.
      rates: the grid of learning rates.
      tune: seeds that choose among them.
      seeds: others, that are reported.
      steps: of each run.
      output: where the results go.
    """
    problems = [
        Problem(condition, noise, steps=steps) for condition in conditions for noise in noises
    ]
    results = {
        "environment": environment(seed=0),
        "settings": {
            "rank": rank,
            "interval": interval,
            "rates": list(rates),
            "tune": tune,
            "seeds": seeds,
        },
        "problems": [],
    }
    for problem in problems:
        rows = compare(problem, rank, interval, rates, tune, seeds)
        results["problems"].append({**dataclasses.asdict(problem), "methods": rows})
        write(results, output, allow_nan=True)
        print(f"\ncondition {problem.condition:g}, noise {problem.noise:g}: final / first loss")
        for name, row in rows.items():
            spread = "" if row["log_std"] is None else f"  std of log {row['log_std']:.2f}"
            edge = "  (edge of the grid)" if row["at_edge"] else ""
            print(f"  {name:36}{row['mean']:11.3e}{spread}  lr {row['learning_rate']:g}{edge}")
    write_results(results, output)
    return results


if __name__ == "__main__":
    run_from_command_line(main)
