"""Fine-tuning of published models."""
