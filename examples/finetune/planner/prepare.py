"""Inputs that all methods of a run share: the model's files, and the records as tokens."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from examples.common.errors import ConfigError, DataError, WeightsError
from examples.common.run_directory import check_apart
from examples.common.train_state import Params
from examples.finetune.planner.batches import Layout, make_layout
from examples.finetune.planner.data.splits import NAMES
from examples.finetune.planner.datasets import Source, load_dataset
from examples.finetune.planner.encode import Chat, Row
from examples.finetune.planner.methods import check_methods
from examples.finetune.planner.plans.parse import END_OF_PLAN
from examples.finetune.planner.plans.records import Record
from examples.finetune.planner.prompts import Retriever, make_pair
from examples.finetune.planner.run_config import RunConfig
from examples.llama.model.config import ModelConfig
from examples.llama.weights.files import open_weights, read_params


class Split(NamedTuple):
    """The records of a split that are used, and what became of the others."""

    records: tuple[Record, ...]
    rows: tuple[Row, ...]  # Of the same records.
    looked_at: int  # As many as it took to find the wanted number.
    marked: int  # Those of them whose plan holds a special token of the model.

    @property
    def too_long(self) -> int:
        """Those of them that were longer than allowed."""
        return self.looked_at - self.marked - len(self.records)


class Prepared(NamedTuple):
    """Records, and a model to train on them."""

    model: ModelConfig  # Its layers are stacked.
    read: Callable[[], Params]  # Reads the weights, anew each time: training gives them up.
    chat: Chat
    splits: dict[str, Split]  # "train", "validation" and "test".
    layout: Layout
    notes: list[str]  # What the user should know.

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens."""
        digest = hashlib.blake2b(digest_size=16)
        for split in self.splits.values():
            for row in split.rows:
                digest.update(row.prompt.to_bytes(8, "big") + row.tokens.tobytes())
        return digest.hexdigest()


def prepare(config: RunConfig) -> Prepared:
    """Reads everything that a run needs.

    Raises:
      ConfigError, DataError, WeightsError: for what cannot be used.
    """
    if config.output.overwrite:
        check_apart(config.run_dir, "--model", config.model)
    file = open_weights(config.model)
    if file.tokenizer is None:
        raise WeightsError(f"{file.path}: no tokenizer")
    if not file.end_ids:
        raise WeightsError(f"{file.path}: no token is said to end an answer (eos_token_id)")
    model = dataclasses.replace(
        file.config, stacked=True, remat=config.remat, dtype=config.dtype, param_dtype="float32"
    )
    check_methods(config.methods, config.method, model)
    longest = config.max_length + config.new_tokens
    if longest > model.max_length:
        raise ConfigError(
            f"max_length={config.max_length} and new_tokens={config.new_tokens} together are above "
            f"the {model.max_length} tokens that {file.path} has positions for"
        )
    source = Source(config.data, config.parts, config.skip_unusable, config.held_out)
    records, notes = load_dataset(config.dataset, source)
    chat = Chat(file.tokenizer, file.chat_template, file.end_ids)
    if chat.template is None:
        notes = [*notes, "the model has no chat template: prompt and plan follow one another"]
    retriever = Retriever(records.train) if config.prompt.examples else None

    def encode(record: Record) -> Row | None:
        pair = make_pair(record, retriever, config.prompt)
        plan = pair.completion.removesuffix(END_OF_PLAN)
        return None if chat.holds_special_token(plan) else chat.encode(pair)

    splits = {
        name: _fitting(
            getattr(records, name),
            config.limit if name == "train" else config.eval_limit,
            encode,
            config.max_length,
            name,
        )
        for name in NAMES
    }
    rows = [row for split in splits.values() for row in split.rows]
    if max(int(row.tokens.max()) for row in rows) >= model.vocab_size:
        raise WeightsError(
            f"{file.path}: the tokenizer has tokens above the {model.vocab_size} of the weights"
        )
    return Prepared(
        model=model,
        read=lambda: read_params(open_weights(config.model), model),
        chat=chat,
        splits=splits,
        layout=make_layout(rows, config.buckets),
        notes=[*notes, *_notes(splits, config)],
    )


def _fitting(
    records: tuple[Record, ...],
    limit: int | None,
    encode: Callable[[Record], Row | None],
    max_length: int,
    name: str,
) -> Split:
    """The records that are not too long, or `limit` of them in an order that is always the same."""
    order = np.random.default_rng(0).permutation(len(records))
    order = sorted(order) if limit is None else order
    chosen, rows, lengths, looked_at = [], [], [], 0
    for i in order:
        if len(chosen) == limit:
            break
        looked_at += 1
        row = encode(records[i])
        if row is None:
            continue
        lengths.append(len(row.tokens))
        if len(row.tokens) <= max_length:
            chosen.append(records[i])
            rows.append(row)
    if not lengths:
        raise DataError(f"every plan of the {name} split holds a special token of the model")
    if not chosen:
        raise ConfigError(
            f"max_length={max_length}: no row of the {name} split is that short, the shortest has "
            f"{min(lengths)} tokens"
        )
    return Split(tuple(chosen), tuple(rows), looked_at, looked_at - len(lengths))


def _notes(splits: dict[str, Split], config: RunConfig) -> list[str]:
    notes = []
    for name, split in splits.items():
        reasons = {
            f"over {config.max_length} tokens": split.too_long,
            "a special token of the model in the plan": split.marked,
        }
        left_out = (
            f", {count} others are left out: {why}" for why, count in reasons.items() if count
        )
        notes.append(f"{name}: {len(split.records)} records{''.join(left_out)}")
    held_out = [row for name in ("validation", "test") for row in splits[name].rows]
    over = sum(row.learned > config.new_tokens for row in held_out)
    if over:
        notes.append(
            f"{over} of {len(held_out)} held-out plans cannot be written in new_tokens="
            f"{config.new_tokens}"
        )
    return notes
