"""Rows from files of every form, tokens and batches."""

import dataclasses
import io
import itertools
import json
import sys
import tarfile
import types

import numpy as np
import pytest
import tiny_encoder as tiny

from examples.common.errors import DataError, WeightsError
from examples.finetune.encoder.config import read_config
from examples.finetune.encoder.data import ARCHIVE, TASKS, read_rows, read_unlabelled
from examples.finetune.encoder.data.batches import (
    Layout,
    eval_batches,
    steps_per_epoch,
    train_batches,
)
from examples.finetune.encoder.data.encode import encode, read_tokenizer
from examples.finetune.encoder.data.make_splits import SIZES, make_splits
from examples.finetune.encoder.data.rows import Row
from examples.finetune.encoder.data.snippets import SPLITS, Snippet, read_archive, related

# Two rows of each task as its official files have them, and what they mean.
GLUE = {
    "cola": (None, ["gj04\t1\t\tA b.", 'gj04\t0\t*\t"A b'], [("A b.", None, 1), ('"A b', None, 0)]),
    "sst2": ("sentence\tlabel", ["a b \t1", "c\t0"], [("a b ", None, 1), ("c", None, 0)]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ["1\t7\t8\ta\tb", "0\t7\t8\tc\td"],
        [("a", "b", 1), ("c", "d", 0)],
    ),
    "stsb": (
        "index\tgenre\tsentence1\tsentence2\tscore",
        ["0\tmain\ta\tb\t5.000", "1\tmain\tc\td\t0.25"],
        [("a", "b", 5.0), ("c", "d", 0.25)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["1\t2\t3\ta\tb\t1", "4\t5\tbroken", "1\t2\t3\tc\td\t0"],
        [("a", "b", 1), ("c", "d", 0)],
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\ta\tb\tneutral\tneutral", "1\tc\td\tx\tcontradiction", "2\te\tf\tx\tentailment"],
        [("a", "b", 1), ("c", "d", 2), ("e", "f", 0)],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\ta\tb\tnot_entailment", "1\tc\td\tentailment"],
        [("a", "b", 1), ("c", "d", 0)],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\ta\tb\tnot_entailment", "1\tc\td\tentailment"],
        [("a", "b", 1), ("c", "d", 0)],
    ),
}


@pytest.fixture
def encoder(tmp_path):
    directory = tiny.write_model(tmp_path / "model")
    config, _ = read_config(directory, 2)
    return config, read_tokenizer(directory, config)


@pytest.mark.parametrize("name", GLUE)
def test_official_files(tmp_path, name):
    header, lines, expected = GLUE[name]
    text = "\r\n".join(([header] if header else []) + lines) + "\r\n"
    ends = ("_matched", "_mismatched") if name == "mnli" else ("",)
    for stem in ("train", *(f"dev{end}" for end in ends)):
        (tmp_path / f"{stem}.tsv").write_text(text, encoding="utf-8", newline="")
    rows = read_rows(TASKS[name], tmp_path)
    assert list(rows.splits) == ["train", *(f"validation{end}" for end in ends)]
    for found in rows.splits.values():
        assert found == [Row(*row) for row in expected]
    assert rows.left_out == (2 if name == "qqp" else 0)
    assert TASKS[name].regression == (rows.labels == ())


def test_the_hub_gives_the_same_rows(monkeypatch):
    record = {"premise": "a", "hypothesis": "b", "idx": 0}
    splits = {
        split: [record | {"label": i} for i in range(3)]
        for split in ("train", "validation_matched", "validation_mismatched")
    }
    asked = []
    library = types.SimpleNamespace(load_dataset=lambda *names: asked.append(names) or splits)
    monkeypatch.setitem(sys.modules, "datasets", library)
    rows = read_rows(TASKS["mnli"], None)
    assert asked == [("nyu-mll/glue", "mnli")]
    assert rows.splits["validation_mismatched"] == [Row("a", "b", i) for i in range(3)]
    splits["train"][1]["label"] = 3
    with pytest.raises(DataError, match=r"train row 2: the label '3' is none of entailment"):
        read_rows(TASKS["mnli"], None)

    def refuse(*_):
        raise ConnectionError("offline\nlong trace")

    library.load_dataset = refuse
    with pytest.raises(DataError, match=r"cannot be read \(ConnectionError: offline\); .*--data"):
        read_rows(TASKS["mnli"], None)


def test_own_rows_name_their_classes(tmp_path):
    tiny.write_rows(tmp_path, label=lambda y: ("spam", "ham")[y])
    rows = read_rows(TASKS["own"], tmp_path)
    assert rows.labels == ("ham", "spam")
    assert {row.label for row in rows.splits["train"]} == {0, 1}
    lines = ["sentence1\tsentence2\tlabel", "a\tb\t-1.5", "c\td\t2"]
    for stem in ("train", "dev"):
        (tmp_path / f"{stem}.jsonl").unlink()
        (tmp_path / f"{stem}.tsv").write_text("\n".join(lines))
    rows = read_rows(TASKS["own-regression"], tmp_path)
    assert rows.splits["train"] == [Row("a", "b", -1.5), Row("c", "d", 2.0)]


@pytest.mark.parametrize(
    ("task", "train", "message"),
    [
        ("sst2", "sentence\tlabel\na\t1\nb\t2", r"train.tsv: line 3: the label '2' is none of neg"),
        ("sst2", "sentence\tlabel\na\t1\nb", r"train.tsv: line 3: 1 columns, expected 2"),
        (
            "sst2",
            "sentence\tclass\na\t1",
            r"line 1: expected the columns sentence, label; got sent",
        ),
        ("sst2", "sentence\tlabel\na\t1", r"train.tsv: no training row of the class negative"),
        ("sst2", "sentence\tlabel\n", r"the train split has no rows"),
        ("sst2", "sentence\tlabel\n\xe9\t1", r"line 2: invalid UTF-8 at byte 0"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t6", r"line 2: the label '6' is no number fr"),
        ("own", "sentence1\tlabel\na\tx\nb\tx", r"train.tsv: two classes are needed, .* 'x'"),
        ("own", "", r"train.tsv: the file is empty"),
        ("own", "sentence1\tlabel\na\tx\nb\t", r'train.tsv: line 3: no "label"'),
        ("own", "sentence1\tlabel\na\tb\tx\nb\ty", r"train.tsv: line 2: 3 columns, expected 2"),
        # A tab in a text: what follows it would be another column.
        ("sst2", "sentence\tlabel\na\tb\t1", r"train.tsv: line 2: 3 columns, expected 2"),
        ("cola", "gj04\t1\t\ta\tb", r"train.tsv: line 1: 5 columns, expected 4"),
        ("own", "sentence1\tlabel\na\tx\n\t", r'train.tsv: line 3: no "label"'),
        ("own", "label\tsentence1\tlabel\n1\ta\tx", r"line 1: the column label is there twice"),
        (
            "own",
            "sentence1\tlabel\na\0\tx",
            r"line 2: 1 NUL byte\(s\), the first at byte 1 of the l",
        ),
        ("own", "\xff\xfes\0", r"train.tsv: UTF-16, expected UTF-8: iconv -f UTF-16"),
        (
            "own",
            "sentence1,label\r" + 99 * "a,x\r",
            r"got 'sentence1,label(\\ra,x){12}\\ra,\.\.\.$",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path, task, train, message):
    (tmp_path / "train.tsv").write_bytes(train.encode("latin-1"))
    (tmp_path / "dev.tsv").write_bytes(train.encode("latin-1"))
    with pytest.raises(DataError, match=message) as error:
        read_rows(TASKS[task], tmp_path)
    assert "\n" not in str(error.value)


def test_csv_files(tmp_path):
    text = '\ufeffsentence1,id,label\r\n"a, ""b""",1,ham\r\n\r\n"c\nd",2,spam\r\n'
    for stem in ("train", "dev", "test"):
        (tmp_path / f"{stem}.csv").write_text(text, encoding="utf-8", newline="")
    rows = read_rows(TASKS["own"], tmp_path)
    assert rows.labels == ("ham", "spam")
    assert rows.splits["train"] == [Row('a, "b"', None, 0), Row("c\nd", None, 1)]
    with pytest.raises(DataError, match=r"test.csv: line 3: a blank line: each line is a row"):
        read_unlabelled(TASKS["own"], tmp_path)
    (tmp_path / "test.csv").write_text("sentence1\n'e', f\n".replace("'", '"'))
    with pytest.raises(DataError, match=r"test.csv: line 2: 2 columns, expected 1"):
        read_unlabelled(TASKS["own"], tmp_path)
    long = "word " * 50_000
    for end in ("", "\n\n"):
        (tmp_path / "test.csv").write_text(f'sentence1\n"e, f"\n{long}\n{end}')
        rows = read_unlabelled(TASKS["own"], tmp_path)["test"]
        assert [row.first for row in rows] == ["e, f", long]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("sentence1,label\na,x\nb\n", r"train.csv: line 3: 1 columns, expected 2"),
        ("text,label\na,x\n", r"line 1: expected the columns sentence1, label; got text, label"),
        ("sentence1, label\na,x\n", r"the columns sentence1, label; got sentence1, ' label'$"),
        ("sentence1,label \na,x\n", r"the columns sentence1, label; got sentence1, 'label '$"),
        ("sentence1,,\na,b,x\n", r"the columns sentence1, label; got sentence1, '', ''$"),
        ('sentence1,label\na,x\n"b,y\n', r"train.csv: line 3: malformed CSV"),
        ("sentence1,label\n\xe9,x\n", r"train.csv: invalid UTF-8 at byte 16"),
        ("", r"train.csv: the file is empty"),
    ],
)
def test_errors_in_csv(tmp_path, train, message):
    (tmp_path / "train.csv").write_bytes(train.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_rows(TASKS["own"], tmp_path)


def test_a_split_is_one_file(tmp_path):
    tiny.write_rows(tmp_path)
    (tmp_path / "train.tsv").write_text("sentence1\tlabel\na\tx\nb\ty\n")
    with pytest.raises(DataError, match=r"train split must be one file, got train.tsv, train.j"):
        read_rows(TASKS["own"], tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"label": 1, "label": 0}', r"line 2: malformed JSON \(the key 'label' is there twice\)"),
        ("[]", r"line 2: expected an object"),
        ('{"sentence1": 3, "label": 0}', r'a string "sentence1", got "sentence1": 3$'),
        ('{"text": "a", "label": 0}', r'a string "sentence1", got the fields text, label$'),
        ("{}", r'line 2: expected a string "sentence1", got no fields$'),
        ('{"sentence1": "a"}', r'line 2: no "label", got the fields sentence1$'),
        ('{"sentence1": "a", "label": null}', r'line 2: no "label"$'),
        ('{"sentence1": "a", "label": " "}', r'line 2: no "label"$'),
        (
            '{"sentence1": "a", "label": ["x"]}',
            r"must be a finite number or a line of text, got \[",
        ),
        ('{"sentence1": "a", "label": "x\\ty"}', r"a finite number or a line of text, got 'x"),
        ('{"sentence1": "a", "label": NaN}', r"a finite number or a line of text, got nan$"),
        ('{"sentence1": "a", "label": -Infinity}', r"a finite number or a line of text, got -inf$"),
        ('{"sentence1": "\\ud83d", "label": 0}', r'line 2: "sentence1" holds half a surrogate pa'),
        ('{"sentence1": "a\\u0000", "label": 0}', r'line 2: "sentence1" holds 1 NUL character'),
        ('{"sentence1": "a", "sentence2": "b", "label": 0}', r"line 2: one sentence and two"),
    ],
)
def test_errors_in_json_lines(tmp_path, line, message):
    tiny.write_rows(tmp_path)
    first = (tmp_path / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "train.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_rows(TASKS["own"], tmp_path)


@pytest.mark.parametrize("zeros", [20, 400])
def test_a_number_whose_square_no_float_holds(tmp_path, zeros):
    tiny.write_rows(tmp_path)
    (tmp_path / "train.jsonl").write_text(f'{{"sentence1": "a", "label": 1{"0" * zeros}}}\n')
    with pytest.raises(DataError, match=r"line 1: the label 10+ is no number from -1e\+18 to 1e"):
        read_rows(TASKS["own-regression"], tmp_path)


def test_columns_that_mean_nothing_are_noted(tmp_path):
    for stem in ("train", "dev"):
        (tmp_path / f"{stem}.tsv").write_text("sentence1\tSentence2\tlabel\na\tb\t1\nc\td\t2")
    assert read_rows(TASKS["own"], tmp_path).unused == ("Sentence2",)
    (tmp_path / "dev.tsv").unlink()
    rows = ['{"sentence1": "a", "label": 1, "source": "web"}', '{"sentence1": "a", "label": 2}']
    (tmp_path / "dev.jsonl").write_text("\n  \n".join(rows))  # A line of blanks.
    _, splits, _, unused = read_rows(TASKS["own"], tmp_path)
    assert unused == ("Sentence2", "source") and [r.label for r in splits["validation"]] == [0, 1]


def test_a_missing_split_is_named(tmp_path):
    tiny.write_rows(tmp_path, {"train": 4})
    with pytest.raises(DataError, match=r"the validation split is missing \(none of dev.tsv"):
        read_rows(TASKS["own"], tmp_path)


def test_long_rows_are_cut_and_counted(encoder):
    config, tokenizer = encoder
    rows = [Row("w4 w5", None, 0), Row(" ".join(["w6"] * 9), None, 1)]
    encoded = encode(tokenizer, rows, config, 8, regression=False)
    assert [list(row) for row in encoded.tokens] == [[2, 4, 5, 3], [2, *[6] * 6, 3]]
    assert encoded.truncated == 1
    pair = [Row("w4 w5 w6 w7 w8", "w9", 0.5)]
    encoded = encode(tokenizer, pair, config, 8, regression=True)
    assert list(encoded.tokens[0]) == [2, 4, 5, 6, 7, 3, 9, 3]
    assert list(encoded.types[0]) == [0] * 6 + [1] * 2
    assert encoded.labels.dtype == np.float32
    roberta = dataclasses.replace(config, architecture="roberta", token_types=1)
    assert not encode(tokenizer, pair, roberta, 8, regression=True).types[0].any()


def test_a_tokenizer_that_does_not_fit(encoder, tmp_path):
    directory = tmp_path / "model"
    small = dataclasses.replace(encoder[0], vocab_size=30)
    with pytest.raises(WeightsError, match=r"50 tokens, the model has 30"):
        read_tokenizer(directory, small)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer.json: not a tokenizer"):
        read_tokenizer(directory, encoder[0])


@pytest.fixture
def encoded(encoder):
    config, tokenizer = encoder
    rows = [Row(text, None, y) for text, y in tiny.sentences(50)]
    return encode(tokenizer, rows, config, 10, regression=False)


LAYOUT = Layout(batch_size=8, max_length=10, pad_token=0, multiple=4)


def test_an_epoch_has_every_row_once(encoded):
    assert steps_per_epoch(encoded, 8) == 7
    stream = train_batches(encoded, LAYOUT, seed=3, start=0)
    epochs = [list(itertools.islice(stream, 7)) for _ in range(2)]
    expected = sorted(tuple(row) for row in encoded.tokens)
    for epoch in epochs:
        rows = [
            tuple(row[mask])
            for batch in epoch
            for row, mask, weight in zip(*batch.inputs[::2], batch.weight, strict=True)
            if weight
        ]
        assert sorted(rows) == expected
        assert {batch.inputs.tokens.shape for batch in epoch} <= {(8, 8), (8, 10)}
    assert not _same(epochs[0][0], epochs[1][0])


def test_batches_do_not_depend_on_where_a_run_begins(encoded):
    whole = list(itertools.islice(train_batches(encoded, LAYOUT, seed=3, start=0), 20))
    for start in (5, 7, 16):
        later = train_batches(encoded, LAYOUT, seed=3, start=start)
        assert all(_same(a, b) for a, b in zip(whole[start:], later, strict=False))
    other = next(train_batches(encoded, LAYOUT, seed=4, start=0))
    assert not _same(whole[0], other)


def test_evaluation_batches_have_every_row_once(encoded):
    found = [(rows, batch) for rows, batch in eval_batches(encoded, LAYOUT)]
    assert sorted(np.concatenate([rows for rows, _ in found])) == list(range(50))
    for rows, batch in found:
        np.testing.assert_array_equal(batch.labels[: len(rows)], encoded.labels[rows])
        assert batch.weight.sum() == len(rows)


def _same(a, b):
    return np.array_equal(a.inputs.tokens, b.inputs.tokens) and np.array_equal(a.labels, b.labels)


def test_related_sentences():
    texts = [
        "Watch Undercover Brother tonight",
        "I saw Undercover Brother twice. Nothing New",
        "Nothing New here",  # Its first word is a name by its place alone.
        "watch it!",
        "Watch it",
    ]
    groups = related([Snippet(i, text, True) for i, text in enumerate(texts)])
    assert sorted(map(sorted, groups)) == [[0, 1], [2], [3, 4]]


def test_splits_hold_whole_groups():
    texts = [f"A Film{i // 3} Name{i // 3} number w{i}" for i in range(4500)]
    snippets = [Snippet(i, f"of {text}", i % 2 == 0) for i, text in enumerate(texts)]
    splits = make_splits(snippets)
    parts = {name: {i // 3 for i in splits[name]} for name in SIZES}
    assert not parts["validation"] & parts["test"]
    for name, size in SIZES.items():
        assert size - 3 < len(splits[name]) == 3 * len(parts[name]) <= size


def test_the_committed_splits():
    splits = json.loads(SPLITS.read_text())
    assert {name: len(set(splits[name])) for name in SIZES} == SIZES
    assert not set(splits["validation"]) & set(splits["test"])


@pytest.mark.skipif(not ARCHIVE.exists(), reason="needs the archive that make finetune fetches")
def test_the_archive_is_split_as_committed():
    snippets = read_archive(ARCHIVE)
    assert len(snippets) == 10_605 - 37
    assert make_splits(snippets) == json.loads(SPLITS.read_text())
    rows = read_rows(TASKS["movie-snippets"], None)
    assert {k: len(v) for k, v in rows.splits.items()} == {"train": 7568, **SIZES}


def test_an_archive_of_other_content_is_refused(tmp_path):
    inner, outer = io.BytesIO(), tmp_path / "x.tar.gz"
    _pack(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", b"1\t0.5\tgood\n2\t0\tx\n")
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with outer.open("wb") as file:
        _pack(file, name, inner.getvalue())
    assert read_archive(outer) == [Snippet(1, "good", True)]
    with pytest.raises(DataError, match=r"not the sentences that snippet_splits.json was made fr"):
        read_rows(TASKS["movie-snippets"], outer)
    outer.write_bytes(outer.read_bytes()[:50])
    with pytest.raises(DataError, match=r"x.tar.gz: not the archive of vaderSentiment"):
        read_archive(outer)
    with pytest.raises(DataError, match=r"no such file; make finetune fetches it"):
        read_archive(tmp_path / "y.tar.gz")


def _pack(file, name, content):
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
