"""Adam whose moments go through eight bits at every step, beside Adam in float32."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.float8_blocks import Blocks, block_max, decode, encode

B1, B2, EPS = 0.9, 0.999, 1e-8
BLOCK, ROWS = 256, 16
SILENT_FROM = 0.5  # a tenth of the entries has no gradient from here on


class Moments(NamedTuple):
    """What one scheme keeps: moments as it reads them, and bounds on them."""

    m: jax.Array
    v: jax.Array
    bound_m: jax.Array
    bound_v: jax.Array


Scheme = Callable[[Moments, jax.Array], Moments]


def quantization_error(spread: float, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """How far each scheme's updates and second moments are from those of float32.

    Args:
      spread: standard deviation of the logarithm of the entries' sizes, within a block of 256.
      steps: of training.
      seed: of the gradients.
    """
    key = jax.random.key(seed)
    keys = jax.random.split(key, 4)
    size = jnp.exp(spread * jax.random.normal(keys[0], (BLOCK, ROWS))) * 1e-3
    mean = 0.2 * size * jax.random.normal(keys[1], size.shape)
    silent = jax.random.uniform(keys[2], size.shape) < 0.1

    def step(carry, t):
        noise = jax.random.normal(jax.random.fold_in(keys[3], t), size.shape)
        g = mean * jnp.cos(t / 300) + size * noise
        g = jnp.where(silent & (t >= SILENT_FROM * steps), 0.0, g)
        stepped = {name: _adam(s, g, t) for name, s in carry.items()}
        exact = stepped["float32"][1]
        figures = {
            name: (
                jnp.sum(jnp.where(silent, 0, u - exact) ** 2),
                jnp.sum(jnp.where(silent, 0, exact) ** 2),
                jnp.max(jnp.abs(u)),
                jnp.max(jnp.abs(jnp.where(silent, u, 0))),
            )
            for name, (_, u) in stepped.items()
        }
        new = {name: SCHEMES[name](s, t) for name, (s, _) in stepped.items()}
        return new, figures

    zero, bound = jnp.zeros(size.shape), jnp.zeros((1, ROWS))
    start = {name: Moments(zero, zero, bound, bound) for name in SCHEMES}
    last, figures = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(start)
    rows = {}
    for name, columns in figures.items():
        error, norm, worst, of_silent = (np.asarray(x, np.float64) for x in columns)
        ratio = np.asarray(last[name].v / last["float32"].v)[~np.asarray(silent)]
        late = slice(steps // 2, None)
        rows[name] = {
            "update_error": float(np.sqrt(error[late].sum() / norm[late].sum())),
            "largest_update": float(worst.max()),
            "last_update_of_silent": float(of_silent[-1]),
            "v_ratio_mean": float(ratio.mean()),
            "v_ratio_std": float(ratio.std()),
        }
    return rows


def _adam(s: Moments, g: jax.Array, t: jax.Array) -> tuple[Moments, jax.Array]:
    peak = jnp.max(jnp.abs(g), 0, keepdims=True)
    s = Moments(
        B1 * s.m + (1 - B1) * g,
        B2 * s.v + (1 - B2) * g * g,
        B1 * s.bound_m + (1 - B1) * peak,
        B2 * s.bound_v + (1 - B2) * peak * peak,
    )
    m, v = s.m / (1 - B1 ** (t + 1)), s.v / (1 - B2 ** (t + 1))
    return s, m / (jnp.sqrt(v) + EPS)


def _ours(noise: Callable[[jax.Array, int], jax.Array | None]) -> Scheme:
    def scheme(s, t):
        codes_m = encode(s.m, s.bound_m, noise(t, 1), is_second=False)
        codes_v = encode(s.v, s.bound_v, noise(t, 0), is_second=True)
        return s._replace(
            m=decode(codes_m, s.bound_m, is_second=False),
            v=decode(codes_v, s.bound_v, is_second=True),
        )

    return scheme


def _by_largest(levels_m: np.ndarray, levels_v: np.ndarray) -> Scheme:
    """The nearest of fixed levels, times the largest absolute value of the block."""

    def nearest(x, levels):
        largest = block_max(x, Blocks(0, BLOCK, 1))
        middles = jnp.asarray((levels[1:] + levels[:-1]) / 2, jnp.float32)
        level = jnp.searchsorted(middles, x / jnp.where(largest > 0, largest, 1))
        return jnp.asarray(levels, jnp.float32)[level] * largest

    return lambda s, t: s._replace(m=nearest(s.m, levels_m), v=nearest(s.v, levels_v))


def _dynamic(is_signed: bool) -> np.ndarray:
    """Seven decades of evenly spaced bins, twice as many in each as in the one below."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (decade + (not is_signed)) + 1)
        levels += list((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    return np.unique([*levels, *(-x for x in levels[2:])] if is_signed else levels)


def _random(t: jax.Array, which: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(which), t)
    return jax.random.bits(key, (BLOCK, ROWS), jnp.uint32)


SCHEMES: Mapping[str, Scheme] = {
    "float32": lambda s, t: s,
    "ours": _ours(lambda t, which: dither((BLOCK, ROWS), t, which, STRIDES[which])),
    "ours, random numbers": _ours(_random),
    "ours, nearest": _ours(lambda t, which: None),
    "dynamic map": _by_largest(_dynamic(True), _dynamic(False)),
    "linear": _by_largest(np.arange(-127, 128) / 127, np.arange(256) / 255),
}
