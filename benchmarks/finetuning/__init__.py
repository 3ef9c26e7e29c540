"""Comparison of fine-tuning methods: ``python -m benchmarks.finetuning --help``."""
