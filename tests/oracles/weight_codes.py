"""Weights in 8 bits and their stochastic rounding, in NumPy."""

import ml_dtypes
import numpy as np

from oracles.eight_bits import dithers

GOLDEN = 0x9E3779B9


def blocks(x: np.ndarray, axis: int, size: int) -> list[np.ndarray]:
    return np.split(x, range(size, x.shape[axis], size), axis)


def new_scales(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """A sixteenth more than the largest of a block needs, in bfloat16."""
    peaks = [np.abs(b).max(axis, keepdims=True) for b in blocks(x, axis, size)]
    peak = np.concatenate(peaks, axis).astype(np.float32)
    return (peak * (np.float32(17 / 16) / np.float32(127))).astype(ml_dtypes.bfloat16)


def spread(scales: np.ndarray, length: int, axis: int, size: int) -> np.ndarray:
    s = np.repeat(scales.astype(np.float32), size, axis)
    return np.take(s, range(length), axis)


def update(x, scales, axis, size, count, salt):
    """Codes and scales of new weights, from their old scales."""
    peaks = [np.abs(b).max(axis, keepdims=True) for b in blocks(x, axis, size)]
    share = np.concatenate(peaks, axis) / scales.astype(np.float32)
    scales = np.where((share <= 127) & (share >= 63.5), scales, new_scales(x, axis, size))
    ratio = x / spread(scales, x.shape[axis], axis, size)
    below = np.floor(ratio)
    threshold = (dithers(x.shape, count, salt, GOLDEN) >> 8) / 2.0**24
    return (below + (threshold < ratio - below)).astype(np.int8), scales
