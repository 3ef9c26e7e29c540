"""Runs that are other ones than their preset promises say so."""

import dataclasses

import pytest
import tiny_run as tiny

from examples.llama.data import DataConfig
from examples.llama.report import warnings_of
from examples.llama.run_config import run_preset


@pytest.fixture
def splits():
    """2,000 tokens of a tokenizer of 48."""
    return tiny.splits()


def small(**changes):
    """One step is 16 tokens, and the tokenizer is what was asked for."""
    config = tiny.run_config(data=DataConfig(vocab_size=tiny.VOCAB))
    return dataclasses.replace(config, **changes)


def test_repeated_text(splits):
    assert warnings_of(small(steps=500), splits) == []  # 4 times.
    (warning,) = warnings_of(small(steps=1000), splits)
    assert "2,000 tokens of training text 8 times" in warning
    streamed = DataConfig(data=("hf:a/b",), vocab_size=tiny.VOCAB)
    assert warnings_of(small(steps=1000, data=streamed), splits) == []


def test_bfloat16_weights_of_a_trained_model(splits):
    model = dataclasses.replace(tiny.MODEL, param_dtype="bfloat16")
    assert warnings_of(small(model=model), splits) == []
    (warning,) = warnings_of(small(model=model, init_from="model"), splits)
    assert "--model.param-dtype float32" in warning


def test_documents_are_counted_as_rows(splits):
    data = DataConfig(rows="documents", vocab_size=tiny.VOCAB)
    assert len(warnings_of(small(steps=2, data=data), splits)) == 0  # 4 rows of 1 document.
    assert len(warnings_of(small(steps=3, data=data), splits)) == 1


def test_a_vocabulary_below_that_of_the_preset(splits):
    config = dataclasses.replace(run_preset("60m"), steps=1, batch_size=1)
    (warning,) = warnings_of(config, splits)
    assert "48 tokens and the preset 60m 32,000" in warning
    enough = dataclasses.replace(splits, vocab_size=32_100)
    assert warnings_of(config, enough) == []
