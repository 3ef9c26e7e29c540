"""Documents into train, validation and test."""

import hashlib
import re
from collections import Counter

from examples.common.errors import DataError

HELD_OUT = 0.05
"""Share of the documents in validation, and again in test."""

_LARGEST_SHARE = 1 / 20
_PIECES = 100
_SEPARATORS = (r"\n\s*\n", r"\n", r"\s", r"")


def split_documents(documents: list[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Returns (train, validation, test), each in the order of the corpus.

    Documents are ordered by a hash of seed and content: the first 5 % are the validation split,
    the next 5 % the test split. The split depends on nothing but content and seed, and exact
    duplicates never fall on both sides of it.

    A document of more than a twentieth of the corpus (one book, say) is first cut into pieces of
    about a hundredth: at blank lines, or else at line ends, or else at white space. The pieces
    then count as documents. Copies that are together more than a twentieth are not held out, unless
    there are fewer than three other documents.
    """
    total = sum(map(len, documents))
    pieces = [piece for text in documents for piece in _cut(text, total, _SEPARATORS)]
    most = total * _LARGEST_SHARE
    counts = Counter(pieces)
    rare = [text for text, copies in counts.items() if copies == 1 or copies * len(text) <= most]
    ranked = sorted(rare if len(rare) >= 3 else counts, key=lambda text: _digest(text, seed))
    if len(ranked) < 3:
        raise DataError(
            "the text is too short to be split into train, validation and test: at least 3 "
            f"different documents or paragraphs are required, got {len(ranked)}: give more --data"
        )
    count = max(1, round(HELD_OUT * len(ranked)))
    validation, test = set(ranked[:count]), set(ranked[count : 2 * count])
    return (
        [text for text in pieces if text not in validation and text not in test],
        [text for text in pieces if text in validation],
        [text for text in pieces if text in test],
    )


def _digest(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), key=str(seed).encode()).digest()


def _cut(text: str, total: int, separators: tuple[str, ...]) -> list[str]:
    """Cuts `text` unless it is at most a twentieth of `total`; the pieces join to `text`."""
    if len(text) <= total * _LARGEST_SHARE or not separators:
        return [text]
    size = max(1, total // _PIECES)
    pieces, start = [], 0
    for match in re.finditer(separators[0], text):
        if match.end() - start >= size:
            pieces.append(text[start : match.end()])
            start = match.end()
    if start < len(text):
        pieces.append(text[start:])
    return [small for piece in pieces for small in _cut(piece, total, separators[1:])]
