"""Whole numbers of eight or four bits times a scale for each block: block by block in NumPy."""

import ml_dtypes
import numpy as np


def encode(x: np.ndarray, bits: int, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, int8 and not packed, and scales, bfloat16."""
    largest = np.float32(2 ** (bits - 1) - 1)
    codes, scales = [], []
    for block in np.split(x, range(size, x.shape[axis], size), axis):
        peak = np.abs(block).max(axis, keepdims=True)
        scale = (peak / largest).astype(ml_dtypes.bfloat16)
        s = scale.astype(np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(s > 0, block / s, 0)
        codes.append(np.clip(np.rint(ratio), -largest, largest).astype(np.int8))
        scales.append(scale)
    return np.concatenate(codes, axis), np.concatenate(scales, axis)


def decode(codes: np.ndarray, scales: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The numbers, float64 and exact."""
    s = np.repeat(scales.astype(np.float64), size, axis)
    return codes * np.take(s, range(codes.shape[axis]), axis)


def unpack(packed: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Codes of four bits, two to a byte: number 2k of an axis in the lower half of byte k."""
    out = [
        np.take(packed, i // 2, axis).astype(np.int16) // (16 if i % 2 else 1) % 16 - 8
        for i in range(length)
    ]
    return np.stack(out, axis).astype(np.int8)
