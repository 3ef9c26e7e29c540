"""The files of a model: local ones, those of a pip package, or from a hub."""

from collections.abc import Sequence
from pathlib import Path

from examples.common.config import path_of
from examples.common.errors import WeightsError, with_type
from examples.pretrained.packages import PACKAGES, locate_package

GGUF = ".gguf"
CONFIG = "config.json"
METHOD_MODEL = "model"
"""Directory of the model in the run of one method of a comparison."""


def locate_model(name: str, files: Sequence[str]) -> Path:
    """The directory of a model, or the one file that it is.

    Args:
      name: a directory or a GGUF file; ``minilm`` or ``smollm2-135m-instruct``, for the pip package
        that brings it along; or else a name on the Hugging Face hub: ``roberta-base``,
        ``owner/model``.
      files: patterns of the files that are fetched from a hub: ``("*.json", "*.safetensors")``.

    Raises:
      WeightsError: if there is no such directory and the hub does not have it or is not reached.
    """
    path = path_of(name)
    if path.is_dir() or (path.suffix == GGUF and path.is_file()):
        return path
    if name in PACKAGES:
        return locate_package(PACKAGES[name])
    # A name on the hub has one slash at most and is never a path of this machine.
    if (
        path.exists()
        or path.is_absolute()
        or name.count("/") > 1
        or name.startswith((".", "~"))
        or path.suffix == GGUF
    ):
        if path.is_file():
            raise WeightsError(f"{name}: expected a directory or a file *{GGUF}")
        what = "file" if path.suffix == GGUF else "directory"
        raise WeightsError(f"{name}: no such {what}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError(
            f"{name}: no such directory; to fetch it from the hub: "
            "python -m pip install huggingface_hub"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    # Anything from no network to a model that needs a token, of a dozen types.
    except Exception as error:
        raise WeightsError(
            f"{name}: no such directory, and the hub cannot be read ({with_type(error)})"
        ) from error


def model_of_method(path: Path) -> Path:
    """The model in the run of one method, or what `path` is otherwise.

    Raises:
      WeightsError: for a comparison of methods.
    """
    if (path / METHOD_MODEL / CONFIG).exists():
        return path / METHOD_MODEL
    methods = sorted(p.parent for p in path.glob(f"*/{METHOD_MODEL}") if p.is_dir())
    if methods and not (path / CONFIG).exists():
        raise WeightsError(
            f"{path}: a comparison of methods: name one of {', '.join(map(str, methods))}"
        )
    return path
