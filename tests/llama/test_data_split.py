"""The split is a partition by documents that depends on content and seed alone."""

import random
import re
from itertools import chain

import pytest

from examples.common.errors import DataError
from examples.llama.data.split import split_documents


def _documents(count, seed=0):
    rng = random.Random(seed)
    return [f"{i} " + "".join(rng.choices("ab cd\n", k=200)) for i in range(count)]


def test_documents_are_partitioned_in_order():
    documents = _documents(200)
    splits = split_documents(documents, 0)
    assert [len(texts) for texts in splits] == [180, 10, 10]
    assert sorted(chain(*splits)) == sorted(documents)
    for texts in splits:
        assert texts == [text for text in documents if text in set(texts)]


def test_split_depends_on_content_and_seed_only():
    documents = _documents(200)
    shuffled = random.Random(1).sample(documents, len(documents))
    for one, other in zip(split_documents(documents, 3), split_documents(shuffled, 3), strict=True):
        assert set(one) == set(other)
    assert set(split_documents(documents, 3)[1]) != set(split_documents(documents, 4)[1])


def test_duplicates_stay_on_one_side():
    documents = _documents(100) * 3
    train, validation, test = map(set, split_documents(documents, 0))
    assert not train & validation and not train & test and not validation & test


def test_a_frequent_document_trains():
    """Nine tenths of a log, say: held out, it would leave a tenth to train on."""
    documents = ["GET /health 200"] * 900 + _documents(100)
    for seed in range(40):
        train, validation, test = split_documents(documents, seed)
        assert train.count(documents[0]) == 900
        assert len(validation) == len(test) == 5


def test_a_text_of_copies_alone_is_split_too():
    assert [len(part) for part in split_documents(_documents(3) * 20, 0)] == [20, 20, 20]


@pytest.mark.parametrize(
    ("separator", "cut"),
    [("\n\n", r"\n\n\Z"), ("\n", r"\n\Z"), (" ", r" \Z"), ("", r"\Z")],
    ids=["paragraphs", "lines", "words", "characters"],
)
def test_one_book_is_cut_into_pieces(separator, cut):
    rng = random.Random(0)
    units = ["".join(rng.choices("abcdefgh", k=rng.randint(20, 60))) for _ in range(1000)]
    book = separator.join(units)
    train, validation, test = split_documents([book], 0)
    held_out = sum(map(len, validation)) / len(book)
    assert 0.03 < held_out < 0.07
    assert sum(map(len, train + validation + test)) == len(book)
    for piece in train + validation + test:
        assert piece in book
        assert re.search(cut, piece) or book.endswith(piece)


def test_only_a_dominating_document_is_cut():
    documents = [*_documents(100), "\n\n".join(_documents(100, seed=1))]
    splits = list(chain(*split_documents(documents, 0)))
    assert set(documents[:-1]) <= set(splits)
    assert documents[-1] not in splits
    pieces = [text for text in splits if text not in documents]
    assert sorted("".join(pieces)) == sorted(documents[-1])
    assert all(piece in documents[-1] for piece in pieces)


@pytest.mark.parametrize("documents", [[], ["x"], ["xx"], ["xxxxxxxx", "xxxx"]])
def test_too_little_text(documents):
    with pytest.raises(DataError, match="too short to be split"):
        split_documents(documents, 0)


def test_least_text():
    assert all(split_documents(["abc"], 0))
