"""The 8-bit format, number by number in NumPy and from its definition."""

import numpy as np

OCTAVES = {False: 8, True: 16}  # of first and of second moments
SMALLEST_C = 2.0**-121


def c_of(bound: float, is_second: bool) -> float:
    """2^-K times the first power of two that is at least two steps above the bound."""
    top = 2.0 ** (np.floor(np.log2(bound)) + 1) if bound else 0.0
    if bound >= top - 2 * top / 32:
        top *= 2
    return max(top * 2.0 ** -OCTAVES[is_second], SMALLEST_C)


def values(c: float, is_second: bool) -> np.ndarray:
    """Exact values of the codes without a sign, before the floor of second moments."""
    octaves, steps = np.meshgrid(np.arange(OCTAVES[is_second]), np.arange(16), indexing="ij")
    return (c * (2.0**octaves * (1 + steps / 16) - 1)).ravel()


def nearest_or_dithered(x: float, c: float, is_second: bool, dither: int | None) -> int:
    """The code of one number. ``dither`` has 32 bits; None rounds to nearest, a tie upwards."""
    # x + c is rounded to float32 by the format; from there on everything is exact.
    y = float(np.float32(np.float32(abs(x)) + np.float32(c)))
    octave = int(np.floor(np.log2(y / c)))
    step = c * 2.0**octave / 16
    below = int((y - c * 2.0**octave) // step)
    part = (y - c * 2.0**octave) / step - below
    threshold = 0.5 if dither is None else 1 - (dither >> 13) / 2**19
    code = min(16 * octave + below + (part >= threshold), 16 * OCTAVES[is_second] - 1)
    return int(code + (128 if not is_second and np.signbit(x) else 0))


def number(code: int, c: float, is_second: bool) -> float:
    if is_second:
        return max(values(c, True)[code], c / 32)
    return float(values(c, False)[code % 128] * (-1 if code >= 128 else 1))


def dithers(shape: tuple[int, ...], step: int, salt: int, stride: int) -> np.ndarray:
    """The hash of indices of ``natgalore_jax._src.kernels.dither``, in Python's integers."""
    mask, out = 2**32 - 1, np.zeros(shape, np.uint32)
    for index in np.ndindex(*shape):
        row = (salt * 0x632BE59B + 0x2545F491) & mask
        for axis, i in enumerate(index[:-1]):
            row = (row ^ (i * (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)[axis % 3])) & mask
            row = (row * 0x7FEB352D) & mask
            row ^= row >> 15
        hashed = row
        if index:
            hashed = ((row ^ (index[-1] * 0x9E3779B9 & mask)) * 0x7FEB352D) & mask
        out[index] = (hashed + step * stride) & mask
    return out
