"""Bytes of optimizer states and of whole training steps."""
