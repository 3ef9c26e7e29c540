"""The error for a run that cannot be done as it was asked for."""


class ConfigError(Exception):
    """A configuration that cannot be run, said in one line."""
