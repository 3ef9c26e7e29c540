"""Ways of running a training step."""
