"""Meaning of the fields of optimizer states, registered by type, and transport at a refresh."""
