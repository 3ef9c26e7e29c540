"""Tolerances between programs that compute the same and round in another order."""

# Sums over devices, or of a batch in parts, differ by 1e-7. The columns of a basis turn by up to a
# hundred times as much where singular values are close, in each of its refreshes, and Adam passes
# that on to the parameters.
LOSSES = {"rtol": 1e-4}
PARAMETERS = {"rtol": 1e-4, "atol": 2e-4}
