"""Predictions of unlabelled rows: GLUE's test files in, GLUE's submission files out."""

import sys
import types

import numpy as np
import pytest

from examples.common.errors import DataError
from examples.finetune.encoder.data import TASKS, Row, Rows, read_predicted
from examples.finetune.encoder.submission import write_submission

# The header of the official test file, a row of it, the names of the submission, and what is
# written for two rows of the last class, or of 5.1 and -0.2.
GLUE = {
    "cola": ("index\tsentence", "0\ta", ["CoLA.tsv"], ["1", "1"]),
    "sst2": ("index\tsentence", "0\ta", ["SST-2.tsv"], ["1", "1"]),
    "mrpc": (
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "0\t1\t2\ta\tb",
        ["MRPC.tsv"],
        ["1", "1"],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
        "0\tx\tx\tx\tx\tx\tx\ta\tb",
        ["STS-B.tsv"],
        ["5.000", "0.000"],
    ),
    "qqp": ("id\tquestion1\tquestion2", "0\ta\tb", ["QQP.tsv"], ["1", "1"]),
    "mnli": (
        "index\tgenre\tsentence1\tsentence2",
        "0\tx\ta\tb",
        ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"],
        ["contradiction", "contradiction"],
    ),
    "qnli": ("index\tquestion\tsentence", "0\ta\tb", ["QNLI.tsv"], ["not_entailment"] * 2),
    "rte": ("index\tsentence1\tsentence2", "0\ta\tb", ["RTE.tsv"], ["not_entailment"] * 2),
}


def _rows(task):
    """Training rows as the task has them."""
    second = None if task.json.second is None else "b"
    return Rows(task.labels or (), {"train": [Row("a", second, 0)]})


@pytest.mark.parametrize("name", GLUE)
def test_official_files(tmp_path, name):
    header, line, files, written = GLUE[name]
    task = TASKS[name]
    splits = ["test_matched", "test_mismatched", "diagnostic"] if name == "mnli" else ["test"]
    for split in splits:
        (tmp_path / f"{split}.tsv").write_text(f"{header}\n{line}\n{line}\n")
    found = read_predicted(task, tmp_path, _rows(task))
    assert list(found) == splits
    expected = Row("a", None if task.json.second is None else "b", 0)
    assert all(rows == [expected, expected] for rows in found.values())

    labels = task.labels or ()
    values = np.array([5.1, -0.2]) if task.regression else np.full(2, len(labels) - 1)
    write_submission(task, labels, dict.fromkeys(found, values), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    for file in files:
        lines = (tmp_path / "out" / file).read_text().splitlines()
        assert lines == ["index\tprediction", f"0\t{written[0]}", f"1\t{written[1]}"]


def test_small_and_large_numbers_of_an_own_regression(tmp_path):
    values = np.array([1.2345678e-7, -3.25e8], np.float32)
    write_submission(TASKS["own-regression"], (), {"test": values}, tmp_path)
    lines = (tmp_path / "predictions.tsv").read_text().splitlines()[1:]
    assert [np.float32(line.split("\t")[1]) for line in lines] == list(values)


def test_numbers_of_a_large_mean_are_written_with_all_digits(tmp_path):
    values = 1.7e9 + np.random.default_rng(0).normal(size=20)
    write_submission(TASKS["own-regression"], (), {"test": values}, tmp_path)
    lines = (tmp_path / "predictions.tsv").read_text().splitlines()[1:]
    assert [float(line.split("\t")[1]) for line in lines] == list(values)


def test_the_hub_has_labels_of_minus_one(monkeypatch):
    records = [{"sentence": text, "label": -1, "idx": i} for i, text in enumerate("ab")]
    library = types.SimpleNamespace(load_dataset=lambda *_: {"test": records})
    monkeypatch.setitem(sys.modules, "datasets", library)
    rows = read_predicted(TASKS["sst2"], None, _rows(TASKS["sst2"]))
    assert rows == {"test": [Row("a", None, 0), Row("b", None, 0)]}


def test_the_diagnostic_rows_may_be_missing_from_files_and_are_a_data_set_of_the_hub(
    tmp_path, monkeypatch
):
    task, record = TASKS["mnli"], {"premise": "a", "hypothesis": "b", "label": -1}
    of_mnli = {"test_matched": [record], "test_mismatched": 2 * [record]}
    parts = {"mnli": of_mnli, "ax": {"test": [record]}}
    library = types.SimpleNamespace(load_dataset=lambda _, part: parts[part])
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = read_predicted(task, None, _rows(task))
    assert {split: len(rows) for split, rows in found.items()} == {
        "test_matched": 1,
        "test_mismatched": 2,
        "diagnostic": 1,
    }
    for end in ("matched", "mismatched"):
        (tmp_path / f"test_{end}.tsv").write_text("sentence1\tsentence2\na\tb\n")
    assert list(read_predicted(task, tmp_path, _rows(task))) == ["test_matched", "test_mismatched"]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", None, r"the test split is missing \(none of test.tsv, test.jsonl, test.csv\)"),
        ("sst2", "index\tsentence\n", "the test split has no rows"),
        ("sst2", "index\ttext\n0\ta\n", "line 1: expected the columns sentence; got index, text"),
        # Of the training rows of QQP, those with too few columns are left out.
        ("qqp", "id\tquestion1\tquestion2\n0\ta\n", "line 2: too few columns"),
        ("sst2", "index\tsentence\n0\ta\tb\n", "line 2: 3 columns, expected 2"),
        ("own", "sentence1\na\n", "line 2: expected two sentences, as in the training rows"),
    ],
)
def test_errors_name_file_and_line(tmp_path, task, text, message):
    if text is not None:
        (tmp_path / "test.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_predicted(TASKS[task], tmp_path, _rows(TASKS[task]))


def test_rows_of_empty_cells_are_rows_to_predict(tmp_path):
    (tmp_path / "test.tsv").write_text("sentence1\tsentence2\na\tb\n\t\n \t \n")
    rows = read_predicted(TASKS["own"], tmp_path, _rows(TASKS["own"]))
    assert rows == {"test": [Row("a", "b", 0), Row("", "", 0), Row(" ", " ", 0)]}
