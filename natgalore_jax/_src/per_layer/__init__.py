"""A training step that updates each layer within the backward pass."""
