"""Inputs that all methods of a run share: the model from files, and the rows as tokens."""

import hashlib
from typing import NamedTuple

import numpy as np

from examples.common.errors import ConfigError
from examples.common.run_directory import check_apart
from examples.common.text import shown_name
from examples.finetune.encoder.config import read_config
from examples.finetune.encoder.data import (
    TASKS,
    Row,
    Rows,
    Task,
    Unit,
    in_unit,
    read_predicted,
    read_rows,
    unit_of,
)
from examples.finetune.encoder.data.batches import Layout
from examples.finetune.encoder.data.encode import Encoded, encode, read_tokenizer
from examples.finetune.encoder.methods import check_methods
from examples.finetune.encoder.run_config import RunConfig
from examples.finetune.encoder.weights import FILES, Pretrained, load_model
from examples.pretrained import locate_model, model_of_method


class Prepared(NamedTuple):
    """A task and a model."""

    task: Task
    rows: Rows  # Labels of a regression in `unit`.
    unit: Unit
    pretrained: Pretrained
    encoded: dict[str, Encoded]  # By split.
    layout: Layout
    predicted: dict[str, Encoded]  # By split, with --predict.

    @property
    def truncated(self) -> dict[str, int]:
        """Rows of each split that were longer than allowed."""
        return {name: part.truncated for name, part in self.encoded.items()}

    @property
    def fingerprint(self) -> str:
        """A hash of the rows that are trained on and evaluated."""
        digest = hashlib.blake2b(digest_size=16)
        for name, part in sorted(self.encoded.items()):
            digest.update(name.encode())
            for array in (part.labels, part.lengths, np.concatenate(part.tokens)):
                digest.update(array.tobytes())
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """Notes about them for the user."""
        found = []
        if self.rows.left_out:
            found.append(f"{self.rows.left_out} malformed rows of the files are left out")
        if self.rows.unused:
            found.append(
                f"columns that are not used: {', '.join(map(shown_name, self.rows.unused))}"
            )
        trained = {row.label for row in self.rows.splits["train"]}
        missing = [name for i, name in enumerate(self.rows.labels) if i not in trained]
        if missing:
            found.append(f"--limit leaves no training row of the class {', '.join(missing)}")
        for name, count in self.truncated.items():
            if count:
                total, longest = len(self.encoded[name].tokens), self.layout.max_length
                found.append(f"{name}: {count} of {total} rows cut to {longest} tokens")
        if self.pretrained.new:
            found.append(f"new, with random values: {', '.join(self.pretrained.new)}")
        if self.pretrained.unused:
            found.append(f"not used: {', '.join(self.pretrained.unused)}")
        return found


def prepare(config: RunConfig) -> Prepared:
    """Reads everything that a run needs.

    Raises:
      ConfigError, DataError, WeightsError: for what cannot be used.
    """
    if config.output.overwrite:
        check_apart(config.run_dir, "--model", config.model)
    task = TASKS[config.task]
    directory = model_of_method(locate_model(config.model, FILES))
    known, _ = read_config(directory, 1)  # The number of classes is one of the rows.
    if config.max_length > known.max_length:
        raise ConfigError(
            f"max_length={config.max_length}: {directory} has positions for {known.max_length}"
        )
    check_methods(config.methods, config.method, known)
    rows = read_rows(task, config.data)
    predicted = read_predicted(task, config.data, rows) if config.output.predict else {}
    counts = {}
    if config.limit is not None:
        counts["train"] = config.limit
    if config.eval_batches is not None:
        counts |= dict.fromkeys(task.held_out, config.eval_batches * config.batch_size)
    fewer = {name: _drawn(rows.splits[name], count) for name, count in counts.items()}
    rows = rows._replace(splits=rows.splits | fewer)
    unit = unit_of(task, rows.splits["train"])
    if task.regression:
        rows = rows._replace(splits={k: in_unit(part, unit) for k, part in rows.splits.items()})
    outputs = 1 if task.regression else len(rows.labels)
    pretrained = load_model(
        directory, outputs, config.seed, labels=rows.labels, unit=unit, new_head=config.new_head
    )
    encoder = pretrained.config.with_dropout(config.dropout)
    tokenizer = read_tokenizer(directory, encoder)

    def encode_all(parts: dict[str, list[Row]]) -> dict[str, Encoded]:
        return {
            name: encode(tokenizer, part, encoder, config.max_length, task.regression)
            for name, part in parts.items()
        }

    batch_size = min(config.batch_size, len(rows.splits["train"]))
    return Prepared(
        task,
        rows,
        unit,
        pretrained._replace(config=encoder),
        encode_all(rows.splits),
        Layout(batch_size, config.max_length, encoder.pad_token),
        encode_all(predicted),
    )


def _drawn(rows: list[Row], count: int) -> list[Row]:
    """So many rows, in their order; the same whatever the seed of a run."""
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(order)]
