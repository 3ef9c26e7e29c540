"""Comparisons of fine-tuning methods."""
