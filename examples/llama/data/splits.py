"""Token arrays of the three splits, made once and cached by content."""

import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from examples.common.errors import DataError
from examples.llama.data.config import DataConfig
from examples.llama.data.corpus import Corpus, load_corpus
from examples.llama.data.tokenizer import (
    END_OF_TEXT,
    TextTokenizer,
    check_vocab_size,
    encode,
    load_tokenizer,
    plain_text,
    save_text_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from examples.pretrained.hf_tokenizer import TOKENIZER

_FORMAT = "1"


@dataclass(frozen=True)
class Splits:
    """Tokens of each split, document after document, each ended by `end_of_text`."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    tokenizer: Tokenizer
    vocab_size: int
    """Number of tokens the tokenizer has: on little text, fewer than were asked for."""
    end_of_text: int
    documents: dict[str, int]
    """Number of documents per split."""
    fingerprint: str
    """Hash of text, split and tokenizer: equal if and only if the arrays are equal."""


def load_splits(config: DataConfig, tokenizer: TextTokenizer | None = None) -> Splits:
    """Reads, splits and tokenises the text of `config`, or takes the arrays from its cache.

    `tokenizer` takes the place of that of `config`. One that is trained is trained on the training
    split alone. Every cache entry is a directory that appears with all its files at once; processes
    that race for it write equal content.
    """
    given = tokenizer
    if given is None and config.tokenizer:
        given = load_tokenizer(config.tokenizer)
    if given is None:
        check_vocab_size(config.vocab_size)
    corpus = load_corpus(config)
    key = _fingerprint(corpus, _identity(given) if given else f"bpe {config.vocab_size}")
    entry = config.cache_dir / key
    if not entry.exists():
        tokenizer = given or plain_text(train_tokenizer(corpus.train, config.vocab_size), "")
        arrays = {name: encode(tokenizer, texts) for name, texts in corpus._asdict().items()}
        _store(entry, tokenizer, arrays)
    return _restore(entry, key, {name: len(texts) for name, texts in corpus._asdict().items()})


def _identity(text_tokenizer: TextTokenizer) -> str:
    """Its text, and the end of documents unless that follows from the names in the text."""
    tokenizer, end = text_tokenizer
    text, known = tokenizer.to_str(), [tokenizer.token_to_id(name) for name in END_OF_TEXT]
    first = next((i for i in known if i is not None), None)
    return text if end == first else f"{text} {end}"


def _fingerprint(corpus: Corpus, tokenizer: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer}".encode())
    for texts in corpus:
        digest.update(f"split {len(texts)}\n".encode())
        for text in texts:
            raw = text.encode()
            digest.update(f"{len(raw)}\n".encode())
            digest.update(raw)
    return digest.hexdigest()[:32]


def _store(entry: Path, tokenizer: TextTokenizer, arrays: dict[str, np.ndarray]) -> None:
    unfinished = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        save_text_tokenizer(*tokenizer, unfinished)
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array)
        os.rename(unfinished, entry)
    except OSError as error:
        # Another process may have been first; its entry is as good as ours.
        if not entry.exists():
            raise DataError(f"{entry.parent}: cannot write the cache ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _restore(entry: Path, fingerprint: str, documents: dict[str, int]) -> Splits:
    try:
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in documents}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{entry}: damaged cache entry, delete it ({error})") from error
    tokenizer, end = load_tokenizer(str(entry / TOKENIZER))
    return Splits(
        **arrays,
        tokenizer=tokenizer,
        vocab_size=vocabulary_size(tokenizer),
        end_of_text=end,
        documents=documents,
        fingerprint=fingerprint,
    )
