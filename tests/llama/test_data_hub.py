"""Streaming with the `datasets` library, on local files laid out as on the hub."""

import dataclasses
import gzip
import json
import os
import sys
from itertools import islice

import numpy as np
import pytest

# Read when `datasets` is imported: no request leaves the machine, a missing name fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("datasets", reason="the hub extra is not installed")

from examples.common.errors import DataError
from examples.llama.data import DataConfig, is_hub, load_splits, make_streaming_iterator

_CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: alone
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
---
"""


def _document(kind, number):
    return f"{kind} {number} " + " ".join(str(number * k % 97) for k in range(number % 13 + 3))


def _write(path, texts):
    records = ({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for text in texts)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))


@pytest.fixture
def config(tmp_path):
    """A data set in the layout of C4: two training shards of 40 documents, 20 to validate."""
    root = tmp_path / "c4"
    (root / "en").mkdir(parents=True)
    (root / "README.md").write_text(_CARD)
    for shard in range(2):
        texts = [_document("train", 40 * shard + i) for i in range(40)]
        _write(root / "en" / f"c4-train.0000{shard}-of-00002.json.gz", texts)
    texts = [_document("validation", i) for i in range(20)]
    _write(root / "en" / "c4-validation.00000-of-00001.json.gz", texts)
    return DataConfig(
        data=(f"hf:{root}:en",), vocab_size=300, max_documents=60, cache_dir=tmp_path / "cache"
    )


@pytest.fixture
def alone(config):
    """The same without a validation split."""
    return dataclasses.replace(config, data=(config.data[0].removesuffix("en") + "alone",))


def _texts(splits, tokens):
    ends = np.flatnonzero(tokens == splits.end_of_text)
    return [splits.tokenizer.decode(p[:-1].tolist()) for p in np.split(tokens, ends + 1)[:-1]]


def _stream(batches):
    """The tokens that a list of batches with rows of shared ends was cut from."""
    rows = np.concatenate([batch["tokens"] for batch in batches])
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])
    return np.append(rows[:, :-1], rows[-1, -1])


def test_splits_come_from_the_splits_of_the_data_set(config):
    splits = load_splits(config)
    assert is_hub(config)
    assert splits.documents == {"train": 60, "validation": 3, "test": 3}
    assert _texts(splits, splits.train) == [_document("train", i) for i in range(60)]
    assert _texts(splits, splits.validation) == [_document("validation", i) for i in range(3)]
    assert _texts(splits, splits.test) == [_document("validation", i) for i in range(3, 6)]


def test_without_validation_split_the_first_documents_are_held_out(alone):
    splits = load_splits(alone)
    assert _texts(splits, splits.validation) == [_document("train", i) for i in range(3)]
    assert _texts(splits, splits.test) == [_document("train", i) for i in range(3, 6)]
    assert _texts(splits, splits.train) == [_document("train", i) for i in range(6, 66)]
    batches = islice(make_streaming_iterator(alone, splits, batch_size=2, seq_len=16), 10)
    assert _texts(splits, _stream(list(batches)))[0] == _document("train", 6)


def test_short_validation_split_is_halved(config):
    splits = load_splits(dataclasses.replace(config, max_documents=400))
    assert splits.documents == {"train": 80, "validation": 10, "test": 10}


def test_stream_is_every_document_in_order_and_repeats(config):
    splits = load_splits(config)
    iterator = make_streaming_iterator(config, splits, batch_size=3, seq_len=16)
    batches = list(islice(iterator, 70))
    assert batches[0]["tokens"].shape == (3, 17)
    assert batches[0]["tokens"].dtype == np.int32
    texts = _texts(splits, _stream(batches))
    assert len(texts) > 80
    assert texts == [_document("train", i % 80) for i in range(len(texts))]


def test_shuffled_rows_of_documents(config):
    config = dataclasses.replace(config, rows="documents", shuffle=20, held_out=5)
    splits = load_splits(config)
    assert splits.documents == {"train": 60, "validation": 5, "test": 5}

    def texts(seed):
        iterator = make_streaming_iterator(config, splits, batch_size=2, seq_len=80, seed=seed)
        rows = np.concatenate([batch["tokens"] for batch in islice(iterator, 40)])
        assert rows.shape == (80, 81) and set(rows[:, -1]) == {-1}
        return [splits.tokenizer.decode(row[row >= 0][:-1].tolist()) for row in rows]

    first, second = texts(seed=1), texts(seed=2)
    assert first != second
    for start in range(0, 80, 20):  # Windows follow one another.
        expected = sorted(_document("train", start + i) for i in range(20))
        assert sorted(first[start : start + 20]) == sorted(second[start : start + 20]) == expected


@pytest.mark.parametrize("change", [{}, {"rows": "documents", "shuffle": 30}], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 11, 45, 60])
def test_restored_stream_continues_identically(config, steps, change):
    config = dataclasses.replace(config, **change)
    splits = load_splits(config)

    def make():
        return make_streaming_iterator(config, splits, batch_size=3, seq_len=16)

    iterator = make()
    list(islice(iterator, steps))
    state = json.dumps(iterator.get_state())
    expected = [batch["tokens"] for batch in islice(iterator, 60)]
    restored = make()
    list(islice(restored, 5))
    restored.set_state(json.loads(state))
    np.testing.assert_array_equal([b["tokens"] for b in islice(restored, 60)], expected)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("which", ["config", "alone"])
def test_processes_read_disjoint_shares(request, which, count):
    config = request.getfixturevalue(which)
    splits = load_splits(config)
    shares = []
    for index in range(count):
        iterator = make_streaming_iterator(
            config, splits, batch_size=count, seq_len=8, process_index=index, process_count=count
        )
        batches = list(islice(iterator, 400 // count))
        assert batches[0]["tokens"].shape == (1, 9)
        shares.append(set(_texts(splits, _stream(batches))))
    union = set().union(*shares)
    assert sum(map(len, shares)) == len(union)
    everything = {_document("train", i) for i in range(80)}
    if which == "config":
        assert union == everything
    else:
        assert union <= everything - {_document("train", i) for i in range(6)}
        # Where shards are shared out, each process leaves out as many of its own.
        assert len(union) >= 80 - 6 * count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"data": ("hf:",)}, "expected hf:NAME"),
        (lambda c: {"data": ("hf:a:b:c:d",)}, "expected hf:NAME"),
        (lambda c: {"data": ("hf:no/such-data",)}, "hf:no/such-data: cannot be opened"),
        (lambda c: {"data": (c.data[0] + ":tests",)}, "no split 'tests'; it has train, val"),
        (lambda c: {"data": (c.data[0][:-2] + "xx",)}, "cannot be opened"),
        (lambda c: {"data": (c.data[0][:-2] + "alone",), "max_documents": 2000}, "train split"),
    ],
)
def test_bad_source_is_named_in_one_line(config, change, message):
    config = dataclasses.replace(config, **change(config))
    with pytest.raises(DataError, match=message) as caught:
        load_splits(config)
    assert config.data[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"content": "x"}\n', 'a record without a string "text"'),
        (b'{"text": "x"}\n{"text": \n', "cannot be"),
    ],
)
def test_bad_records(tmp_path, config, raw, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.json.gz").write_bytes(gzip.compress(raw))
    config = dataclasses.replace(config, data=(f"hf:{tmp_path / 'bad'}",), max_documents=1)
    with pytest.raises(DataError, match=message) as caught:
        load_splits(config)
    assert "\n" not in str(caught.value)


def test_missing_library_names_the_extra(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_splits(config)
