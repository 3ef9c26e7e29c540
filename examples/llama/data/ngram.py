"""Unigram and bigram perplexity: what a model must beat to have learned more than counts."""

from typing import NamedTuple

import numpy as np


def ngram_perplexity(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Token-weighted perplexities of both models over the targets of a LM, `held_out[..., 1:]`.

    `held_out` is a text, (n,), or rows, (R, T + 1), in which padding is below 0.
    """
    held_out = np.asarray(held_out, np.int64)
    is_target = held_out[..., 1:] >= 0
    histories, targets = held_out[..., :-1][is_target], held_out[..., 1:][is_target]
    unigram = unigram_probabilities(train, vocab_size)
    bigram = fit_bigram(train, vocab_size)
    return {
        "unigram": _perplexity(unigram[targets]),
        "bigram": _perplexity(bigram_probabilities(bigram, histories, targets)),
    }


def unigram_probabilities(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Add-one smoothing: `p(w) = (c(w) + 1) / (N + V)`, shape (V,)."""
    return (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)


class Bigram(NamedTuple):
    """Interpolated Kneser-Ney counts; V is the size of the vocabulary."""

    keys: np.ndarray  # Sorted codes `history * V + word` of the bigrams seen, shape (B,).
    counts: np.ndarray  # Their counts, shape (B,).
    history_counts: np.ndarray  # c(h), shape (V,).
    followers: np.ndarray  # Distinct words seen after h, shape (V,).
    lower: np.ndarray  # Continuation probability of each word, shape (V,).
    discount: float


def fit_bigram(tokens: np.ndarray, vocab_size: int) -> Bigram:
    r"""Counts the bigrams of `tokens`.

    .. math:: p(w \mid h) = \frac{\max(c(h, w) - D, 0) + D\, |\{w' : c(h, w') > 0\}|\, p_l(w)}
              {c(h)}, \qquad p_l(w) = \frac{|\{h' : c(h', w) > 0\}| + 1}{B + V}

    with B distinct bigrams and D estimated from the numbers of bigrams seen once and twice. The
    lower order counts the contexts of a word rather than the word (Kneser and Ney 1995, "Improved
    backing-off for m-gram language modeling"); after an unseen h it stands alone.
    """
    tokens = np.asarray(tokens, np.int64)
    keys, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    histories, words = np.divmod(keys, vocab_size)
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    contexts = np.bincount(words, minlength=vocab_size)
    return Bigram(
        keys=keys,
        counts=counts,
        history_counts=np.bincount(tokens[:-1], minlength=vocab_size),
        followers=np.bincount(histories, minlength=vocab_size),
        lower=(contexts + 1) / (len(keys) + vocab_size),
        # Add-one keeps D strictly between 0 and 1, so that no probability is zero.
        discount=float((once + 1) / (once + 2 * twice + 2)),
    )


def bigram_probabilities(bigram: Bigram, histories: np.ndarray, words: np.ndarray) -> np.ndarray:
    """`p(word | history)` for arrays of tokens of equal shape."""
    vocab_size = len(bigram.lower)
    key = np.asarray(histories, np.int64) * vocab_size + words
    place = np.minimum(np.searchsorted(bigram.keys, key), len(bigram.keys) - 1)
    count = np.where(bigram.keys[place] == key, bigram.counts[place], 0)
    total = bigram.history_counts[histories]
    spared = bigram.discount * bigram.followers[histories]
    backed_off = np.where(total > 0, spared / np.maximum(total, 1), 1.0)
    direct = np.maximum(count - bigram.discount, 0) / np.maximum(total, 1)
    return direct + backed_off * bigram.lower[words]


def _perplexity(probabilities: np.ndarray) -> float:
    return float(np.exp(-np.mean(np.log(probabilities))))
