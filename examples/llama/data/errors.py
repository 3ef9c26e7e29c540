"""The error for input that the user can correct."""


class DataError(Exception):
    """One line that names the file or option at fault; programs print it and exit with 1."""
