"""Training rows and evaluation batches against plain loops."""

import itertools
from collections import Counter
from itertools import islice

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.common.errors import DataError
from examples.llama.data import (
    document_rows,
    eval_batches,
    eval_rows,
    make_train_iterator,
    ngram_perplexity,
)
from examples.llama.data.ngram import bigram_probabilities, fit_bigram, unigram_probabilities


def _take(iterator, count):
    return np.stack([batch["tokens"] for batch in islice(iterator, count)])


@pytest.mark.parametrize(("length", "rows"), [(81, 10), (88, 10), (89, 11)])
def test_an_epoch_visits_every_row_once(length, rows):
    tokens = np.arange(length, dtype=np.uint16)
    iterator = make_train_iterator(tokens, batch_size=1, seq_len=8, seed=0)
    expected = Counter(tuple(range(8 * i, 8 * i + 9)) for i in range(rows))
    epochs = [_take(iterator, rows)[:, 0] for _ in range(3)]
    for epoch in epochs:
        assert Counter(map(tuple, epoch.tolist())) == expected
        assert epoch.dtype == np.int32
    assert len({epoch.tobytes() for epoch in epochs}) == 3


def test_batches_run_across_epochs():
    iterator = make_train_iterator(np.arange(25), batch_size=4, seq_len=8, seed=0)
    batches = _take(iterator, 3)
    assert batches.shape == (3, 4, 9)
    assert Counter(batches[..., 0].ravel().tolist()) == {0: 4, 8: 4, 16: 4}


def test_seeds():
    def order(seed):
        tokens = np.arange(8001)
        return _take(make_train_iterator(tokens, batch_size=500, seq_len=8, seed=seed), 4)

    np.testing.assert_array_equal(order(5), order(5))
    assert not np.array_equal(order(5), order(6))
    # The second epoch of one seed is not the first of the next.
    assert not np.array_equal(order(5)[2:], order(6)[:2])


@pytest.mark.parametrize("steps", [0, 1, 7, 30])
def test_restored_iterator_continues_identically(steps, tmp_path):
    def make():
        return make_train_iterator(np.arange(321), batch_size=3, seq_len=8, seed=1)

    iterator = make()
    list(islice(iterator, steps))
    manager = ocp.CheckpointManager(tmp_path / "ckpt")
    manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    expected = _take(iterator, 20)
    restored = make()
    manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    manager.close()
    np.testing.assert_array_equal(_take(restored, 20), expected)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_share_one_global_batch(count):
    def take(index, count):
        iterator = make_train_iterator(
            np.arange(321),
            batch_size=6,
            seq_len=8,
            seed=1,
            process_index=index,
            process_count=count,
        )
        return _take(iterator, 15)

    together = np.concatenate([take(i, count) for i in range(count)], axis=1)
    np.testing.assert_array_equal(together, take(0, 1))


@pytest.mark.parametrize("length", [2, 9, 10, 33, 64, 65, 66, 200])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_covers_every_target_once(length, processes):
    tokens = np.random.default_rng(0).permutation(length).astype(np.uint16)
    predicted = []
    for p in range(processes):
        for batch in eval_batches(tokens, 4, 8, process_index=p, process_count=processes):
            assert batch["tokens"].shape == (4 // processes, 9)
            assert batch["tokens"].dtype == np.int32
            assert batch["mask"].shape == (4 // processes, 8)
            for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
                for t in range(8):
                    if mask[t]:
                        predicted.append((int(row[t]), int(row[t + 1])))
    expected = [(int(tokens[i]), int(tokens[i + 1])) for i in range(length - 1)]
    assert Counter(predicted) == Counter(expected)


@pytest.mark.parametrize(("seq_len", "rows"), [(3, 3), (4, 2), (8, 1), (9, 1)])
def test_the_rows_of_an_evaluation_are_those_with_a_target(seq_len, rows):
    tokens = np.arange(9)
    assert eval_rows(tokens, seq_len) == rows
    batches = eval_batches(tokens, 1, seq_len)
    assert [batch["mask"].any() for batch in batches] == [True] * rows
    assert eval_rows(DOCUMENTS, 4, documents_end=0) == len(ROWS)


def test_bad_sizes():
    with pytest.raises(DataError, match="8 tokens, fewer than one row of 9"):
        make_train_iterator(np.arange(8), batch_size=2, seq_len=8, seed=0)
    with pytest.raises(DataError, match="batch size 6 is not a multiple of 4 processes"):
        make_train_iterator(np.arange(99), batch_size=6, seq_len=8, seed=0, process_count=4)
    with pytest.raises(DataError, match="1 tokens: too short to evaluate"):
        next(eval_batches(np.arange(1), 2, 8))
    with pytest.raises(DataError, match="--seq-len of at least 2, got 1"):
        list(eval_batches(np.array([5, 0, 7, 0]), 2, 1, documents_end=0))


DOCUMENTS = np.array([5, 6, 7, 8, 9, 0, 4, 0, 1, 2, 3, 0], np.uint16)  # 0 ends each.
ROWS = {(5, 6, 7, 0, -1), (4, 0, -1, -1, -1), (1, 2, 3, 0, -1)}  # Of 4 tokens at most.


def test_rows_of_documents_are_cut_before_their_end_and_padded():
    iterator = make_train_iterator(DOCUMENTS, batch_size=3, seq_len=4, seed=0, documents_end=0)
    for batch in _take(iterator, 2):
        assert set(map(tuple, batch.tolist())) == ROWS


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_covers_every_document_once(processes):
    found = []
    for p in range(processes):
        for batch in eval_batches(
            DOCUMENTS, 2, 4, documents_end=0, process_index=p, process_count=processes
        ):
            assert batch["tokens"].min() == 0  # Padding has a token, and no part in the loss.
            padded = np.where(batch["mask"], batch["tokens"][:, 1:], -1)
            found += [
                (int(t[0]), *r) for t, r in zip(batch["tokens"], padded.tolist(), strict=True)
            ]
    assert Counter(found) == Counter({**dict.fromkeys(ROWS, 1), (0, -1, -1, -1, -1): 1})


def test_ngram_models_are_compared_on_the_targets_of_the_documents():
    rows = document_rows(DOCUMENTS, 4, 0)
    assert set(map(tuple, rows.tolist())) == ROWS
    pairs = [p for row in ROWS for p in itertools.pairwise(row) if p[1] >= 0]
    train = np.arange(10) % 7
    chance = unigram_probabilities(train, 10)[[target for _, target in pairs]]
    found = ngram_perplexity(train, rows, 10)
    assert found["unigram"] == pytest.approx(np.exp(-np.log(chance).mean()))
    bigram = fit_bigram(train, 10)
    chance = bigram_probabilities(bigram, *np.transpose(pairs))
    assert found["bigram"] == pytest.approx(np.exp(-np.log(chance).mean()))
