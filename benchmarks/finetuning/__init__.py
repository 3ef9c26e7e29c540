"""Comparison of optimizers that fine-tune an encoder: ``python -m benchmarks.finetuning --help``."""
