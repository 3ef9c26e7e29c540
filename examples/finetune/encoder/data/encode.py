"""Rows as tokens, and how many of them were cut."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.common.errors import WeightsError
from examples.finetune.encoder.config import EncoderConfig
from examples.finetune.encoder.data.rows import Row
from examples.pretrained import hf_tokenizer


class Encoded(NamedTuple):
    """Rows of different lengths."""

    tokens: list[np.ndarray]  # (length,) int32 each.
    types: list[np.ndarray]  # (length,) int32 each: 0, or 1 for the second sentence.
    labels: np.ndarray  # (rows,) int32, or float32 for a regression.
    truncated: int  # Rows that were longer than allowed.

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens])


def read_tokenizer(directory: Path, config: EncoderConfig) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
      WeightsError: if the file is missing or damaged, or has tokens that the model does not.
    """
    path = directory / hf_tokenizer.TOKENIZER
    tokenizer = hf_tokenizer.read_tokenizer(directory)
    if tokenizer is None:
        raise WeightsError(f"{path}: no such file")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise WeightsError(
            f"{path}: {tokenizer.get_vocab_size()} tokens, the model has {config.vocab_size}"
        )
    return tokenizer


def encode(
    tokenizer: Tokenizer, rows: list[Row], config: EncoderConfig, max_length: int, regression: bool
) -> Encoded:
    """Tokens of each row, at most `max_length`, of which the longer sentence loses the end."""
    tokenizer.enable_truncation(max_length)  # strategy "longest_first"
    texts = [row.first if row.second is None else (row.first, row.second) for row in rows]
    encodings = tokenizer.encode_batch(texts)
    # RoBERTa does not tell two sentences apart, whatever its tokenizer says.
    kinds = min(config.token_types - 1, 1)
    return Encoded(
        [np.array(e.ids, np.int32) for e in encodings],
        [kinds * np.array(e.type_ids, np.int32) for e in encodings],
        np.array([row.label for row in rows], np.float32 if regression else np.int32),
        sum(bool(e.overflowing) for e in encodings),
    )
