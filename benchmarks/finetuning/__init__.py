"""Which optimizer fine-tunes the better encoder: ``python -m benchmarks.finetuning --help``."""
