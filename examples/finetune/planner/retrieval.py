"""Training records whose queries are like a given one."""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import linear_kernel

from examples.finetune.planner.records import Record


class Retriever:
    """Similarity is the cosine of TF-IDF vectors of words and pairs of words.

    Raises:
      ValueError: if there are no records, or none has a word.
    """

    def __init__(self, train: Sequence[Record]):
        """Takes the records to choose from: the training split, and nothing that is held out."""
        self._records = tuple(train)
        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        self._vectors = self._vectorizer.fit_transform([record.query for record in train])

    def nearest(
        self, query: str, count: int, allowed: Callable[[Record], bool] = lambda record: True
    ) -> list[Record]:
        """Returns the `count` allowed records most like `query`, the nearest first.

        Of equally near ones the earlier comes first; fewer are returned if no more are allowed.
        """
        # The vectors have length 1, so that their product is the cosine.
        similarity = linear_kernel(self._vectorizer.transform([query]), self._vectors)[0]
        order = np.argsort(-similarity, kind="stable")
        found: list[Record] = []
        for i in order:
            if len(found) == count:
                break
            if allowed(self._records[i]):
                found.append(self._records[i])
        return found
