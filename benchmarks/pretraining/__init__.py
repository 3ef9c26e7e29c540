"""Comparison of optimizers in pre-training: one JSON file a run, and tables made from the files.

``python -m benchmarks.pretraining --help`` lists the commands, ``benchmarks/README.md`` says what
each suite of runs is for.
"""
