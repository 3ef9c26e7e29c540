"""Byte-level BPE: train, load, encode."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.common.config import path_of
from examples.common.errors import DataError
from examples.pretrained.hf_tokenizer import TOKENIZER
from examples.pretrained.locate import locate_model

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")
"""Names of the token that ends a document, in order of preference; the first is ours."""

_CHUNK = 512


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with at most `vocab_size` tokens: every text can be encoded."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(
            f"vocab_size {vocab_size} is too small: {len(alphabet)} bytes and an end-of-text token"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _as_plain_text(tokenizer)


def load_tokenizer(path: str) -> Tokenizer:
    """Loads the JSON file of a `tokenizers.Tokenizer`, of a directory, or of a name on the hub."""
    if not path.endswith(".json") and not path_of(path).is_file():
        path = str(locate_model(path, (TOKENIZER,)) / TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(path_of(path)))
    # The bindings raise plain Exception for a missing file and for malformed JSON alike.
    except Exception as error:
        raise DataError(f"{path}: not a tokenizer file of `tokenizers` ({error})") from error
    return plain_text(tokenizer, path)


def plain_text(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """Makes it read documents as they are. `source` is where it is from, for messages."""
    end_of_text(tokenizer, source)
    return _as_plain_text(tokenizer)


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


def end_of_text(tokenizer: Tokenizer, source: str = "the tokenizer") -> int:
    """Id of the token that ends a document. `source` is for the message of the DataError."""
    ids = (tokenizer.token_to_id(name) for name in END_OF_TEXT)
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise DataError(f"{source}: no end-of-text token (one of {', '.join(END_OF_TEXT)})")
    return found


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of embedding rows the tokenizer needs; its ids may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """Returns the tokens of all documents in one array, each document followed by end-of-text."""
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.int32
    end = [end_of_text(tokenizer)]
    # In chunks: encodings are about a hundred times larger than their ids.
    chunks = [documents[i : i + _CHUNK] for i in range(0, len(documents), _CHUNK)]
    return np.concatenate(
        [np.zeros(0, dtype)]
        + [
            np.asarray(encoding.ids + end, dtype)
            for chunk in chunks
            for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        ]
    )
