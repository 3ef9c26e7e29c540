"""The error for input that the user can correct."""

from collections.abc import Generator
from contextlib import contextmanager


class DataError(Exception):
    """One line that names the file and the place in it; programs print it and exit with 1."""


@contextmanager
def located(where: str) -> Generator[None]:
    """Says where a plan or a record is wrong."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
