"""Meaning of the fields of optimizer states, registered by type, and their transport at a refresh."""
