"""Errors that the user can correct.

Programs print the one line of the message and exit with 1.
"""


class ConfigError(Exception):
    """A configuration that cannot be run."""


class DataError(Exception):
    """Unusable input; the line names the file or option, and the place in the file."""


class WeightsError(Exception):
    """Unusable weights; the line names the file and the tensors."""


class CheckpointError(Exception):
    """A checkpoint that could not be written, or cannot be read."""


USER_ERRORS = (ConfigError, DataError, WeightsError, CheckpointError, OSError)


def first_line(error: Exception) -> str:
    """Of an error's text, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def with_type(error: Exception) -> str:
    """Type and first line of an error of another package, whose text may say little alone."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
