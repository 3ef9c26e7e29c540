"""No combination of tools on two sides, in the committed file and in what makes such files."""

import json
import random

import pytest

from examples.common.errors import DataError
from examples.finetune.planner.data import apply_splits, split_by_tools
from examples.finetune.planner.data.splits import NAMES, read_splits, write_splits
from examples.finetune.planner.plans.plan import JOIN, Call, Plan
from examples.finetune.planner.plans.records import Record, Tool

_TOOLS = tuple(Tool(name) for name in "abcdef")


def _records(count=300, seed=0):
    rng = random.Random(seed)
    records = []
    for i in range(count):
        calls = [Call(rng.choice("abcdef")) for _ in range(rng.randint(1, 4))]
        records.append(
            Record(f"{'xy'[i % 2]}/{i}", f"query {i}", _TOOLS, Plan((*calls, Call(JOIN))))
        )
    return records


def test_no_held_out_combination_of_the_committed_splits_is_in_training():
    splits = read_splits()
    tools = {name: {group.tools for group in getattr(splits, name)} for name in NAMES}
    assert [len(tools[name]) for name in NAMES] == [229, 26, 30]
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not {frozenset(t) for t in tools[one]} & {frozenset(t) for t in tools[other]}
    ids = [i for name in NAMES for group in getattr(splits, name) for i in group.records]
    assert len(ids) == len(set(ids)) == 1300
    # Every part of the data set is in every split.
    for name in NAMES:
        parts = {i.split("/")[0] for group in getattr(splits, name) for i in group.records}
        assert parts == {"executable", "glaive", "sgd", "complexfuncbench"}


def test_combinations_stay_together_whatever_the_order_of_the_records():
    records = _records()
    splits = split_by_tools(records, stratum=lambda record: "")
    parts = apply_splits(records, splits)
    assert sorted(r.id for part in parts for r in part) == sorted(r.id for r in records)
    combinations = [{record.combination for record in part} for part in parts]
    assert not combinations[0] & combinations[1] and not combinations[0] & combinations[2]
    assert not combinations[1] & combinations[2]
    for held_out in parts[1:]:
        assert 0.05 * len(records) < len(held_out) <= 0.1 * len(records)
    shuffled = random.Random(1).sample(records, len(records))
    again = apply_splits(records, split_by_tools(shuffled))
    assert again == parts
    assert split_by_tools(records, seed=1).test != splits.test


def test_a_split_by_name_has_tools_of_its_own():
    rng = random.Random(0)
    names = [f"t{i}" for i in range(60)]
    records = []
    for i in range(50):
        offered = tuple(Tool(name) for name in rng.sample(names, rng.randint(1, 2)))
        plan = Plan((Call(offered[0].name), Call(JOIN)))
        records.append(Record(str(i), f"query {i}", offered, plan))
    parts = apply_splits(records, split_by_tools(records, by_name=True))
    assert all(parts) and sum(map(len, parts)) == 50
    offered = [{tool.name for record in part for tool in record.tools} for part in parts]
    assert not offered[0] & offered[1] and not offered[0] & offered[2]
    assert not offered[1] & offered[2]
    # By the tools that are called alone, some are on offer in another split.
    parts = apply_splits(records, split_by_tools(records))
    offered = [{tool.name for record in part for tool in record.tools} for part in parts]
    assert offered[0] & (offered[1] | offered[2])


def test_files_round_trip_and_damage_is_named(tmp_path):
    splits = split_by_tools(_records())
    path = tmp_path / "splits.json"
    write_splits(splits, path)
    assert read_splits(path) == splits

    content = json.loads(path.read_text())
    moved = content["train"][0]
    content["test"].append(moved)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"splits\.json: .* is in train and again in test"):
        read_splits(path)
    del content["test"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"splits\.json: test must be a list"):
        read_splits(path)
    content["test"] = [{"tools": [["a"]], "records": []}]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"splits\.json: test: tools must be a string"):
        read_splits(path)


def test_splits_of_other_records_are_refused():
    splits = split_by_tools(_records())
    with pytest.raises(
        DataError, match=r"made from other records: 300 with .*, not these 299 with "
    ):
        apply_splits(_records()[1:], splits)
