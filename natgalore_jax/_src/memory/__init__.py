"""Bytes of an optimizer's state and of a training step."""
