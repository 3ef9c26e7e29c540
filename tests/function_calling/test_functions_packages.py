"""The real data of the packages, where they are installed."""

import dataclasses
import importlib.metadata

import pytest

from examples.finetune.planner.data import apply_splits, bfcl, load_bfcl, load_nestful, nestful
from examples.finetune.planner.data.make_splits import make_splits
from examples.finetune.planner.data.splits import read_splits
from examples.finetune.planner.plans.metrics import Scores, score
from examples.finetune.planner.plans.parse import parse_plan, write_plan


def _needs(package):
    name, version, _ = package
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    return pytest.mark.skipif(
        installed != version,
        reason=f"{name}=={version} is needed, {installed} is installed: "
        "see $(VENV)/.functions in the Makefile",
    )


def _check(records):
    for record in records:
        assert parse_plan(write_plan(record.plan)) == record.plan
    for record in records[::20]:
        text = write_plan(record.plan)
        scores = score(record, text)
        # The official score takes prices for results.
        assert scores.success or "$$" in text
        assert dataclasses.replace(scores, success=1.0) == Scores(1.0, 1.0, 1.0, 1.0, 1.0)


@_needs(nestful.PACKAGE)
def test_nestful_is_read_whole_and_split_as_committed():
    records = load_nestful()
    assert len(records) == 1300
    assert max(len(record.plan.calls) for record in records) == 12
    _check(records)
    assert make_splits(records) == read_splits()
    assert [len(part) for part in apply_splits(records, read_splits())] == [1044, 128, 128]


@_needs(bfcl.PACKAGE)
def test_bfcl_is_read_whole():
    records = load_bfcl()
    assert len(records) == 2351
    assert len({record.id for record in records}) == 2351
    _check(records)
