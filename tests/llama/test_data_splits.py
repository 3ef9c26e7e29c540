"""Token arrays of a corpus: right, and cached by content."""

import dataclasses
import random
import warnings

import numpy as np
import pytest
import tiny_run as tiny

from examples.common.errors import DataError
from examples.llama.data import DataConfig, load_splits, splits
from examples.llama.data.corpus import load_corpus, load_documents
from examples.llama.data.tokenizer import plain_text, train_tokenizer


@pytest.fixture
def config(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(50)]
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=200)))
    return DataConfig(data=(str(tmp_path / "text"),), vocab_size=320, cache_dir=tmp_path / "cache")


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args):
        raise AssertionError("the tokenizer was trained again")

    monkeypatch.setattr(splits, "train_tokenizer", fail)


def test_arrays_hold_the_documents(config):
    loaded = load_splits(config)
    assert loaded.documents == {"train": 36, "validation": 2, "test": 2}
    assert loaded.vocab_size == 320
    for name, texts in load_corpus(config)._asdict().items():
        tokens = getattr(loaded, name)
        pieces = np.split(tokens, np.flatnonzero(tokens == loaded.end_of_text) + 1)
        assert [loaded.tokenizer.decode(piece[:-1].tolist()) for piece in pieces[:-1]] == texts
        assert len(pieces[-1]) == 0


def test_second_load_comes_from_the_cache(config, request):
    first = load_splits(config)
    request.getfixturevalue("no_training")
    second = load_splits(config)
    assert first.fingerprint == second.fingerprint
    for name in first.documents:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert len(list(config.cache_dir.iterdir())) == 1


def test_any_change_makes_another_entry(config, tmp_path):
    keys = [load_splits(config).fingerprint]
    keys.append(load_splits(dataclasses.replace(config, vocab_size=321)).fingerprint)
    keys.append(load_splits(dataclasses.replace(config, split_seed=1)).fingerprint)
    (tmp_path / "text" / "7.txt").write_text("changed " * 100)
    keys.append(load_splits(config).fingerprint)
    assert len(set(keys)) == 4


def test_given_tokenizer_is_used(config, tmp_path, no_training):
    tokenizer = train_tokenizer(["other text"], 260)
    tokenizer.save(str(tmp_path / "given.json"))
    loaded = load_splits(dataclasses.replace(config, tokenizer=str(tmp_path / "given.json")))
    assert loaded.vocab_size == 260
    (first, *_) = load_corpus(config).train
    assert loaded.tokenizer.decode(loaded.train[: len(tokenizer.encode(first).ids)]) == first


def test_an_interrupted_write_leaves_no_entry(config, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(splits.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        load_splits(config)
    assert list(config.cache_dir.iterdir()) == []


def test_losing_a_race_keeps_the_winner(config, monkeypatch):
    load_splits(config)
    (entry,) = config.cache_dir.iterdir()
    exists = splits.Path.exists
    seen = []

    def not_yet(path):
        # The entry appears between the look-up and the rename.
        seen.append(path)
        return exists(path) if len(seen) > 1 or path != entry else False

    corpus = load_corpus(config)
    monkeypatch.setattr(splits, "load_corpus", lambda config: corpus)
    monkeypatch.setattr(splits.Path, "exists", not_yet)
    assert load_splits(config).documents["train"] == 36
    assert list(config.cache_dir.iterdir()) == [entry]


def test_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the cache"):
        load_splits(dataclasses.replace(config, cache_dir=tmp_path / "file"))


def test_a_full_disk_is_named(config):
    corpus = load_corpus(config)
    with (
        tiny.full_disk(1000),
        pytest.raises(DataError, match=r"cannot write the cache \(.*File too large\)$"),
    ):
        tokenizer = plain_text(train_tokenizer(corpus.train, 300), "")
        splits._store(config.cache_dir / "a", tokenizer, {})
    assert list(config.cache_dir.iterdir()) == []


def test_damaged_entry_is_named(config):
    load_splits(config)
    (entry,) = config.cache_dir.iterdir()
    (entry / "train.npy").write_bytes(b"")
    with pytest.raises(DataError, match=f"{entry}: damaged cache entry, delete it"):
        load_splits(config)


def test_a_file_that_is_named_twice_is_named_in_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    once = DataConfig(data=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))
    with warnings.catch_warnings(action="error"):
        assert sorted(load_documents(once)) == ["one", "two"]
    with pytest.warns(UserWarning, match=r"b\.txt is named 3 times, and read as often"):
        found = load_documents(DataConfig(data=(str(tmp_path), str(tmp_path / "b.txt"))))
    assert sorted(found) == ["one", "two", "two", "two"]
