"""Names of the texts that models are trained on."""

from examples.common.errors import ConfigError

CORPORA: dict[str, tuple[str, ...]] = {
    "sotu": ("sotu",),
    "shakespeare": ("shakespeare",),
    # Streamed, for users with a network; the papers' own.
    "c4": ("hf:allenai/c4:en",),
}


def resolve(corpus: str) -> tuple[str, tuple[str, ...]]:
    """Name and sources of ``corpus``: a key of ``CORPORA``, or NAME=FILE[,FILE...] for other text.

    Raises:
      ConfigError: if it is neither.
    """
    name, given, files = corpus.partition("=")
    if given and name and files and name not in CORPORA and "/" not in name:
        return name, tuple(files.split(","))
    if corpus not in CORPORA:
        raise ConfigError(
            f"corpus must be one of {', '.join(CORPORA)}, or a new name with its files, "
            f"NAME=FILE[,FILE...]; got {corpus!r}"
        )
    return corpus, CORPORA[corpus]
