"""Sentences of movie reviews with ratings from people, out of the source archive of vaderSentiment.

Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", 2014: 10,605 sentences, each the mean of at least 20 ratings from -4 to 4. The sign is the
label; 37 sentences rated 0 have none. No model is told the rating.
"""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from examples.common.errors import DataError
from examples.finetune.encoder.data.rows import RawRow, Rows, make_rows
from examples.finetune.encoder.data.tasks import TASKS

VERSION = "3.3.2"
ARCHIVE = Path(".cache/glue") / f"vaderSentiment-{VERSION}.tar.gz"
SPLITS = Path(__file__).with_name("snippet_splits.json")
_INNER = f"vaderSentiment-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_HELD_OUT = ("validation", "test")


class Snippet(NamedTuple):
    """A sentence that has a sign."""

    id: int
    text: str
    positive: bool


def read_snippets(archive: Path = ARCHIVE) -> Rows:
    """All sentences, in the committed splits.

    Raises:
      DataError: if the archive is missing or damaged, or is not the one that was split.
    """
    snippets = read_archive(archive)
    splits = json.loads(SPLITS.read_text(encoding="utf-8"))
    if splits["fingerprint"] != fingerprint(snippets):
        raise DataError(f"{archive}: not the sentences that {SPLITS.name} was made from")
    where = {number: name for name in _HELD_OUT for number in splits[name]}
    raw: dict[str, list[RawRow]] = {name: [] for name in ("train", *_HELD_OUT)}
    for snippet in snippets:
        row = RawRow(f"{archive}: sentence {snippet.id}", snippet.text, None, int(snippet.positive))
        raw[where.get(snippet.id, "train")].append(row)
    return make_rows(TASKS["movie-snippets"], raw)


def read_archive(archive: Path) -> list[Snippet]:
    """The sentences with a sign, in their order."""
    if not archive.exists():
        raise DataError(
            f"{archive}: no such file; make finetune fetches it, or: python -m pip download "
            f"--no-deps --no-binary :all: vaderSentiment=={VERSION} -d {archive.parent}"
        )
    if archive.is_dir():
        raise DataError(f"{archive}: a directory; for rows of your own pass --task own")
    try:
        inner = _content(archive.read_bytes(), _INNER)
        text = _content(inner, _FILE).decode("latin-1")
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        raise DataError(
            f"{archive}: not the archive of vaderSentiment {VERSION} ({error})"
        ) from error
    snippets = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        try:
            id_, rating, sentence = line.split("\t")
            if float(rating):
                snippets.append(Snippet(int(id_), sentence.strip(), float(rating) > 0))
        except ValueError as error:
            raise DataError(f"{archive}: line {number} of {_FILE}: {error}") from error
    return snippets


def related(snippets: list[Snippet]) -> list[list[int]]:
    """Groups of ids of sentences that may be about one film, or are the same.

    The data do not say which film a sentence is about. Two sentences are in one group if both have
    the same two capitalised words in a row somewhere after their first word ("Undercover
    Brother"), or the same text.
    """
    parent = {snippet.id: snippet.id for snippet in snippets}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[str, int] = {}
    for snippet in snippets:
        for sign in _signs(snippet.text):
            parent[root(snippet.id)] = root(first_with.setdefault(sign, snippet.id))
    groups: dict[int, list[int]] = {}
    for snippet in snippets:
        groups.setdefault(root(snippet.id), []).append(snippet.id)
    return list(groups.values())


def fingerprint(snippets: list[Snippet]) -> str:
    text = json.dumps([list(snippet) for snippet in snippets])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _signs(text: str) -> set[str]:
    """Names in a text, and the text itself: two sentences about one film may share them."""
    words = re.findall(r"[\w'-]+|[.!?]", text)
    pairs = zip(words, words[1:], words[2:], strict=False)
    names = {
        f"{a} {b}".lower().replace("'s", "")
        for before, a, b in pairs
        if before not in ".!?" and a[0].isupper() and b[0].isupper()
    }
    return names | {"= " + " ".join(re.findall(r"\w+", text.lower()))}


def _content(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        file = files.extractfile(name)
        assert file is not None  # None for a directory.
        return file.read()
