"""Texts that models are trained on."""

import os
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

from examples.common.errors import ConfigError

CORPORA: dict[str, tuple[str, ...]] = {
    "sotu": ("sotu",),
    "shakespeare": ("shakespeare",),
    # Streamed, for users with a network; the papers' own.
    "c4": ("hf:allenai/c4:en",),
}


def _modules() -> list[str]:
    """Modules of the standard library of the Python that runs, without packages."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths]


def _topics() -> list[str]:
    """Topics of ``help()``, of the Python that runs."""
    from pydoc_data.topics import topics

    return list(topics.values())


# Texts that come with Python, whose version is in the environment of a run.
WRITTEN: dict[str, Callable[[], list[str]]] = {"stdlib": _modules, "pydoc": _topics}


def name_of(corpus: str) -> str:
    """The name of ``corpus``: of ``CORPORA`` or ``WRITTEN``, or NAME of NAME=FILE[,FILE...].

    Raises:
      ConfigError: if it is neither.
    """
    name, given, files = corpus.partition("=")
    own = (*CORPORA, *WRITTEN)
    if given and name and files and name not in own and "/" not in name:
        return name
    if corpus not in own:
        raise ConfigError(
            f"corpus must be one of {', '.join(own)}, or a new name with its files, "
            f"NAME=FILE[,FILE...]; got {corpus!r}"
        )
    return corpus


def title_of(name: str) -> str:
    """Name of a text in tables and figures."""
    return {"sotu": "addresses", "shakespeare": "Shakespeare"}.get(name, name)


def sources_of(corpus: str, cache_dir: Path) -> tuple[str, ...]:
    """Sources of a corpus, as ``--data`` of examples.llama; a text of ``WRITTEN`` is written."""
    name = name_of(corpus)
    if name != corpus:
        return tuple(corpus.partition("=")[2].split(","))
    if name in CORPORA:
        return CORPORA[name]
    path = cache_dir / f"{name}-{platform.python_version()}.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Runs that start at the same time must not read half a text.
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text("\n\n".join(WRITTEN[name]()), encoding="utf-8")
        unfinished.replace(path)
    return (str(path),)
