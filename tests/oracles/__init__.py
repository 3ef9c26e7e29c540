"""Published algorithms in NumPy float64, written from their papers, for the tests to compare with.

They share nothing with the library and look nothing like it: dense solves, Python loops, no jax.
"""
