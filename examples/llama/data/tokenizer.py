"""Byte-level BPE: train, load, encode."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.common.config import path_of
from examples.common.errors import DataError, first_line
from examples.pretrained.hf_tokenizer import SETTINGS, TOKENIZER, stated_end, write_tokenizer
from examples.pretrained.locate import locate_model

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")
"""Names of the token that ends a document, in order of preference; the first is ours."""

_END_OF_TURN = "<|im_end|>"
_CHUNK = 512


class TextTokenizer(NamedTuple):
    """A tokenizer that reads documents as they are."""

    tokenizer: Tokenizer
    end_of_text: int
    """Id of the token that ends a document."""


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with at most `vocab_size` tokens: every text can be encoded."""
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _as_plain_text(tokenizer)


def check_vocab_size(vocab_size: int) -> None:
    """Raise a DataError if a tokenizer of so many tokens cannot be trained."""
    least = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < least:
        raise DataError(
            f"vocab_size must be at least {least}, for {least - 1} bytes and an end-of-text token; "
            f"got {vocab_size}"
        )


def load_tokenizer(path: str, stated: Sequence[int] = ()) -> TextTokenizer:
    """Loads the JSON file of a `tokenizers.Tokenizer`, of a directory, or of a name on the hub.

    `stated` are ids that may end a document, where no `tokenizer_config.json` beside it has one.

    Raises:
      DataError: if it is damaged, or has no token that ends a document: see :func:`end_of_text`.
    """
    if not path.endswith(".json") and not path_of(path).is_file():
        path = str(locate_model(path, (TOKENIZER, SETTINGS)) / TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(path_of(path)))
    # The bindings raise plain Exception for a missing file and for malformed JSON alike.
    except Exception as error:
        raise DataError(f"{path}: not a tokenizer file of `tokenizers` ({error})") from error
    file = path_of(path)
    end = stated_end(tokenizer, file.parent) if file.name == TOKENIZER else None
    return plain_text(tokenizer, path, stated if end is None else (end,))


def save_text_tokenizer(tokenizer: Tokenizer, end_of_text: int, directory: Path) -> None:
    """Write both, for :func:`load_tokenizer` and for transformers."""
    tokens = {"eos_token": str(tokenizer.id_to_token(end_of_text))}
    write_tokenizer(tokenizer, None, tokens, directory)


def plain_text(tokenizer: Tokenizer, source: str, stated: Sequence[int] = ()) -> TextTokenizer:
    """Makes it read documents as they are; for the arguments see :func:`end_of_text`."""
    end = end_of_text(tokenizer, source, stated)
    return TextTokenizer(_as_plain_text(tokenizer), end)


def _as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    # A file may carry the truncation and padding of another use, which would drop text; and the
    # name of a special token inside a document is text, not a control token.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def for_prompts(tokenizer: Tokenizer, *, start: bool) -> Tokenizer:
    """A tokenizer that adds no token after a text, and with `start` the same ones before it.

    The templates of T5 and BERT end a text. A model would begin another document after that token
    instead of continuing the prompt.
    """
    if not tokenizer.num_special_tokens_to_add(False):
        return tokenizer
    encoding = tokenizer.encode("a")
    added = encoding.special_tokens_mask
    if start and not added[-1]:
        return tokenizer
    count = [*added, 0].index(0) if start else 0
    before = list(zip(encoding.tokens, encoding.ids, strict=True))[:count]
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.encode_special_tokens = tokenizer.encode_special_tokens  # Not in the string.
    changed.post_processor = processors.TemplateProcessing(
        single=[*(token for token, _ in before), "$A"], special_tokens=before
    )
    return changed


def end_of_text(
    tokenizer: Tokenizer, source: str = "the tokenizer", stated: Sequence[int] = ()
) -> int:
    """Id of the token that ends a document.

    It is the stated one if its name is known: a vocabulary may have several of these names, some
    as text. Chat models state a token that ends a turn, so a known name comes before others.

    Args:
      tokenizer: has the names.
      source: where it is from, for messages.
      stated: ids that the files of a model state as `eos_token_id`.

    Raises:
      DataError: if no id is stated, and no name known.
    """
    named = {tokenizer.token_to_id(name): name for name in END_OF_TEXT}
    known = [i for i in named if i is not None]
    ends = [i for i in known if i in stated and named[i] != _END_OF_TURN]
    possible = [*ends, *known, *(i for i in stated if tokenizer.id_to_token(i) is not None)]
    if not possible:
        raise DataError(
            f"{source}: no end-of-text token (one of {', '.join(END_OF_TEXT)}, or the eos_token of "
            f"{SETTINGS} beside a {TOKENIZER})"
        )
    return possible[0]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of embedding rows the tokenizer needs; its ids may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def encode(text_tokenizer: TextTokenizer, documents: Sequence[str]) -> np.ndarray:
    """Returns the tokens of all documents in one array, each document followed by end-of-text.

    A document has no other one: the vocabulary of a Unigram model, such as T5's, also has its name
    as a piece of text, which is left out.
    """
    tokenizer, end = text_tokenizer
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.int32
    # In chunks: encodings are about a hundred times larger than their ids.
    chunks = [documents[i : i + _CHUNK] for i in range(0, len(documents), _CHUNK)]
    return np.concatenate(
        [np.zeros(0, dtype)]
        + [
            np.asarray([*(i for i in encoding.ids if i != end), end], dtype)
            for chunk in chunks
            for encoding in _encodings(tokenizer, chunk)
        ]
    )


def _encodings(tokenizer: Tokenizer, documents: Sequence[str]) -> list[Any]:
    try:
        return tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    # The bindings raise plain Exception, for a text with characters that have no token.
    except Exception as error:
        raise cannot_encode(error) from error


def cannot_encode(error: Exception) -> DataError:
    """For a text that a tokenizer without an unknown token has no tokens for."""
    return DataError(f"the tokenizer cannot encode the text ({first_line(error)})")
