"""Tasks: their sentences, labels, files and metrics."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


class Columns(NamedTuple):
    """Names of the columns of a row; `second` is None for single sentences."""

    first: str
    second: str | None
    label: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification, or with `regression` one number for a row."""

    name: str
    tsv: Columns
    """Columns of the files of GLUE."""
    json: Columns
    """Columns of the data sets library and of JSON lines."""
    metrics: tuple[str, ...]
    """The first one is the one that is compared."""
    labels: tuple[str, ...] | None = None
    """Names of the classes; None if the training rows tell them. Files may have names or numbers
    from 0 on."""
    regression: bool = False
    range: tuple[float, float] | None = None
    """Of the labels of a regression."""
    validation: tuple[str, ...] = ("validation",)
    """Splits that are evaluated after every epoch."""
    test: tuple[str, ...] = ()
    """Splits with labels that are evaluated at the end."""
    submission: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"test": "predictions.tsv"}
    )
    """Splits whose labels --predict writes, and the file of each, by GLUE's name."""
    diagnostic: str | None = None
    """The one of these splits that --data may leave out: no rows of the task itself."""
    submits_names: bool = True
    """Whether these files name the classes; else they number them from 0 on."""
    header: bool = True
    """Whether the first line of a TSV file names the columns; else they are in the order of
    `tsv_order`."""
    tsv_order: tuple[str, ...] = ()
    malformed_rows: bool = False
    """Whether the official files have rows of too few columns, which everyone leaves out."""
    unnamed_columns: bool = False
    """Whether the official files have columns that their header does not name, after the others."""

    @property
    def held_out(self) -> tuple[str, ...]:
        return self.validation + self.test


def _single(name: str, labels: tuple[str, ...], metrics: tuple[str, ...], **more) -> Task:
    columns = Columns("sentence", None, "label")
    return Task(name, columns, columns, metrics, labels, **more)


def _pair(
    name: str,
    first: str,
    second: str,
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...],
    *,
    tsv: Columns | None = None,
    **more,
) -> Task:
    columns = Columns(first, second, "label")
    return Task(name, tsv or columns, columns, metrics, labels, **more)


_ENTAILMENT = ("entailment", "not_entailment")
_BINARY_F1 = ("f1", "accuracy")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _single(
            "cola",
            ("unacceptable", "acceptable"),
            ("matthews",),
            submission={"test": "CoLA.tsv"},
            submits_names=False,
            header=False,
            tsv_order=("source", "label", "mark", "sentence"),
        ),
        _single(
            "sst2",
            ("negative", "positive"),
            ("accuracy",),
            submission={"test": "SST-2.tsv"},
            submits_names=False,
        ),
        _pair(
            "mrpc",
            "sentence1",
            "sentence2",
            ("not_equivalent", "equivalent"),
            _BINARY_F1,
            tsv=Columns("#1 String", "#2 String", "Quality"),
            submission={"test": "MRPC.tsv"},
            submits_names=False,
        ),
        _pair(
            "stsb",
            "sentence1",
            "sentence2",
            None,
            ("pearson", "spearman"),
            tsv=Columns("sentence1", "sentence2", "score"),
            submission={"test": "STS-B.tsv"},
            regression=True,
            range=(0.0, 5.0),
        ),
        _pair(
            "qqp",
            "question1",
            "question2",
            ("not_duplicate", "duplicate"),
            _BINARY_F1,
            tsv=Columns("question1", "question2", "is_duplicate"),
            submission={"test": "QQP.tsv"},
            submits_names=False,
            malformed_rows=True,
        ),
        _pair(
            "mnli",
            "premise",
            "hypothesis",
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            tsv=Columns("sentence1", "sentence2", "gold_label"),
            validation=("validation_matched", "validation_mismatched"),
            submission={
                "test_matched": "MNLI-m.tsv",
                "test_mismatched": "MNLI-mm.tsv",
                "diagnostic": "AX.tsv",
            },
            diagnostic="diagnostic",
            unnamed_columns=True,
        ),
        _pair(
            "qnli",
            "question",
            "sentence",
            _ENTAILMENT,
            ("accuracy",),
            submission={"test": "QNLI.tsv"},
        ),
        _pair(
            "rte",
            "sentence1",
            "sentence2",
            _ENTAILMENT,
            ("accuracy",),
            submission={"test": "RTE.tsv"},
        ),
        # The user's own rows: {"sentence1": ..., "sentence2": ..., "label": ...}, where sentence2
        # may be missing from all of them.
        _pair("own", "sentence1", "sentence2", None, ("accuracy",)),
        _pair(
            "own-regression",
            "sentence1",
            "sentence2",
            None,
            ("pearson", "spearman"),
            regression=True,
        ),
        # What `make finetune` runs.
        _single(
            "movie-snippets",
            ("negative", "positive"),
            ("accuracy",),
            test=("test",),
        ),
    )
}
OPTIONAL_SECOND = ("own", "own-regression")
