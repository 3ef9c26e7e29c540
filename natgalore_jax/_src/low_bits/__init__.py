"""Moments and weights in 8 bits, and stochastic rounding."""
