"""Evaluation of a model: the loss of held-out plans, and plans that it writes."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from examples.common.train_state import Params
from examples.finetune.planner.batches import batches, learned_tokens
from examples.finetune.planner.plans.metrics import Scores, mean_scores, score
from examples.finetune.planner.plans.records import Record
from examples.finetune.planner.prepare import Prepared, Split
from examples.finetune.planner.train_step import loss_of
from examples.llama.model.generate import generate
from examples.llama.model.llama import Llama, unstack_layers, with_params

EVALUATED = ("loss", "metrics", "plans", "seconds_per_plan")
"""Fields of the summary of an evaluation."""


@dataclass(frozen=True)
class Prediction:
    """Plan that a model wrote."""

    record: Record
    prompt: str
    """The text that the model continued, without its special tokens."""
    text: str
    ended: bool
    """Whether it came to an end by itself."""
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """Result of a split."""

    loss: float
    """Of the reference plans: nats a token, the end mark included."""
    predictions: tuple[Prediction, ...]
    seconds_per_plan: float | None
    """Seconds until a batch of plans is written, without compiling; None if
    everything was compiled on the way."""

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "loss": self.loss,
            "metrics": asdict(mean_scores(p.scores for p in self.predictions)),
            "plans": len(self.predictions),
            "seconds_per_plan": self.seconds_per_plan,
        }


class Evaluator:
    """Evaluates plain weights, those of a model without adapters, in stacked layers.

    One for all methods: its programs are compiled once.
    """

    def __init__(self, prepared: Prepared, *, batch_size: int, plans_at_once: int, new_tokens: int):
        self._prepared, self._batch_size = prepared, batch_size
        self._plans_at_once, self._new_tokens = plans_at_once, new_tokens
        self._compiled: set[int] = set()

    def __call__(
        self, params: Params, split: str, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """The evaluation of a split, or None if it was told to stop."""
        part = self._prepared.splits[split]
        loss = self._loss(params, part, should_stop)
        written = None if loss is None else self._write(params, part, should_stop)
        if loss is None or written is None:
            return None
        predictions, seconds = written
        return Evaluation(loss, predictions, float(np.median(seconds)) if seconds else None)

    def _loss(self, params: Params, part: Split, should_stop: Callable[[], bool]) -> float | None:
        model = with_params(self._prepared.model, params)
        total, tokens = 0.0, 0
        size = min(self._batch_size, len(part.rows))
        for _, batch in batches(part.rows, self._prepared.layout, size):
            if should_stop():
                return None
            total += float(loss_of(model, batch))
            tokens += learned_tokens([batch])
        return total / tokens

    def _write(
        self, params: Params, part: Split, should_stop: Callable[[], bool]
    ) -> tuple[tuple[Prediction, ...], list[float]] | None:
        model = self._unstacked(params)
        chat, size = self._prepared.chat, self._plans_at_once
        found: dict[int, Prediction] = {}
        seconds: list[float] = []
        order = sorted(range(len(part.rows)), key=lambda i: part.rows[i].prompt)
        for start in range(0, len(order), size):
            if should_stop():
                return None
            numbers = order[start : start + size]
            prompts = [part.rows[i].tokens[: part.rows[i].prompt].tolist() for i in numbers]
            width = self._prepared.layout.shape_for(max(map(len, prompts))).tokens
            # Copies fill up the last batch, so that nothing is compiled for it.
            prompts += prompts[:1] * (size - len(prompts))
            generated = generate(
                model,
                prompts,
                self._new_tokens,
                end_ids=chat.end_ids,
                pad_to=width,
                should_stop=should_stop,
            )
            if should_stop():
                return None
            if width in self._compiled:
                seconds.append(generated.prompt_seconds + generated.seconds)
            self._compiled.add(width)
            for i, tokens, ended in zip(numbers, generated.tokens, generated.ended, strict=False):
                row, record, text = part.rows[i], part.records[i], chat.decode(tokens)
                prompt = chat.decode(row.tokens[: row.prompt].tolist())
                found[i] = Prediction(record, prompt, text, ended, score(record, text))
        return tuple(found[i] for i in range(len(found))), seconds

    def _unstacked(self, params: Params) -> Llama:
        # A second copy of the weights, but plans are written faster from it. All of them are placed
        # alike: weights of a checkpoint are bound to their device, for which jit compiles anew.
        config = dataclasses.replace(self._prepared.model, stacked=False, remat=False)
        return with_params(config, jax.device_put(unstack_layers(params), jax.devices()[0]))
