"""N-gram perplexities against probabilities computed with dictionaries and loops."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from examples.llama.data import ngram_perplexity
from examples.llama.data.ngram import bigram_probabilities, fit_bigram, unigram_probabilities


def _tokens(length, vocab_size, seed):
    rng = np.random.default_rng(seed)
    return rng.zipf(1.4, length) % vocab_size


def _brute_force_bigram(train, vocab_size):
    pairs = Counter(pairwise(train))
    once = sum(count == 1 for count in pairs.values())
    twice = sum(count == 2 for count in pairs.values())
    discount = (once + 1) / (once + 2 * twice + 2)

    def probability(history, word):
        continuation = sum(pair[1] == word for pair in pairs)
        lower = (continuation + 1) / (len(pairs) + vocab_size)
        total = sum(count for pair, count in pairs.items() if pair[0] == history)
        if total == 0:
            return lower
        followers = sum(pair[0] == history for pair in pairs)
        direct = max(pairs[history, word] - discount, 0)
        return (direct + discount * followers * lower) / total

    return probability


def test_perplexities_equal_brute_force():
    vocab_size = 30
    train, held_out = _tokens(400, 25, 0), _tokens(150, vocab_size, 1)
    counts = Counter(train.tolist())
    unigram = [(counts[w] + 1) / (len(train) + vocab_size) for w in held_out[1:].tolist()]
    bigram = _brute_force_bigram(train.tolist(), vocab_size)
    held = held_out.tolist()
    paired = [bigram(h, w) for h, w in pairwise(held)]
    assert max(held) >= 25  # Words and histories that training never showed.
    expected = {
        name: math.exp(-sum(map(math.log, p)) / len(p))
        for name, p in {"unigram": unigram, "bigram": paired}.items()
    }
    result = ngram_perplexity(train.astype(np.uint16), held_out.astype(np.uint16), vocab_size)
    assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "train", [_tokens(400, 25, 0), np.array([3, 3]), np.arange(20), np.tile([1, 2], 50)]
)
def test_probabilities_sum_to_one(train):
    vocab_size = 30
    np.testing.assert_allclose(unigram_probabilities(train, vocab_size).sum(), 1, rtol=1e-12)
    histories, words = np.meshgrid(range(vocab_size), range(vocab_size), indexing="ij")
    table = bigram_probabilities(fit_bigram(train, vocab_size), histories, words)
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-12)
    assert table.min() > 0


def test_known_source():
    """A first-order Markov chain: the bigram model finds its entropy rate, the unigram cannot."""
    rng = np.random.default_rng(0)
    follows = rng.integers(0, 2, 60_000)
    tokens = np.zeros(60_001, int)
    for i, bit in enumerate(follows):
        tokens[i + 1] = (2 * tokens[i] + bit) % 64  # Two equally likely successors each.
    result = ngram_perplexity(tokens[:50_000], tokens[50_000:], 64)
    assert result["bigram"] == pytest.approx(2, rel=0.01)
    assert result["unigram"] == pytest.approx(64, rel=0.01)


def test_large_vocabulary_does_not_overflow():
    """Pair codes reach the square of the vocabulary, beyond 32 bits."""
    vocab_size = 128_256
    train = np.array([vocab_size - 1, 5] * 50, np.int32)
    bigram = fit_bigram(train, vocab_size)
    assert bigram_probabilities(bigram, train[:1], train[1:2])[0] > 0.98
