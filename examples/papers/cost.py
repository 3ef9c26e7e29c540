"""Cost of an experiment, from shapes alone, and the table of docs/papers.md."""

import dataclasses
import importlib
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

from examples.llama.memory.step_memory import live_gradients, resident
from examples.llama.run_config import RunConfig
from examples.llama.training.build import abstract_run
from examples.papers.experiments import LLAMA, Experiment


class Cost(NamedTuple):
    """Of all runs of an experiment."""

    runs: int
    tokens: int | None  # trained on, padding included; None: as many as the rows of a data set
    memory: int | None  # bytes of weights, gradients and optimizer state of the largest run


def configurations(name: str, experiment: Experiment) -> dict[str, Any]:
    """Of each run of an experiment, checked by its program."""
    parse = importlib.import_module(f"{experiment.program}.__main__").parse
    return {run: parse([*arguments]) for run, arguments in experiment.runs(name).items()}


def cost(name: str, experiment: Experiment) -> Cost:
    """Runs and tokens, and of pre-training the memory, without activations."""
    configs = list(configurations(name, experiment).values())
    if experiment.program != LLAMA:
        return Cost(len(configs), None, None)
    tokens = sum(config.steps * config.tokens_per_step for config in configs)
    # Runs that differ in rates, steps or intervals take the same memory.
    distinct = {repr(_sizes(config)): _sizes(config) for config in configs}
    return Cost(len(configs), tokens, max(map(_memory, distinct.values())))


def _sizes(config: RunConfig) -> RunConfig:
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1.0, update_interval=None)
    output = dataclasses.replace(config.output, name=None)
    return dataclasses.replace(config, steps=1, optimizer=optimizer, output=output)


def _memory(config: RunConfig) -> int:
    run = abstract_run(config)
    return resident(run).total + live_gradients(run.params, config.per_layer)


def table(experiments: Mapping[str, Experiment]) -> str:
    """Experiments under the tables of the papers, one row a method for all its sizes; Markdown."""
    rows = [("experiment", "runs", "tokens", "GB"), ("---",) * 4]
    for source, names in groupby(experiments, lambda name: experiments[name].source):
        rows.append((f"**{source}**", "", "", ""))
        methods: dict[str, list[str]] = {}
        for name in names:
            methods.setdefault(name.partition("/")[2], []).append(name)
        for of_method in methods.values():
            costs = [cost(name, experiments[name]) for name in of_method]
            runs = ", ".join(dict.fromkeys(str(c.runs) for c in costs))
            tokens = ", ".join(_tokens(c.tokens) for c in costs if c.tokens is not None)
            memory = ", ".join(f"{c.memory / 1e9:.2f}" for c in costs if c.memory is not None)
            rows.append((f"`{_joined(of_method)}`", runs, tokens, memory))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _joined(names: list[str]) -> str:
    """``corpus-size/method``; names that differ in their sizes as one, with braces."""
    if len(names) == 1:
        return names[0]
    corpus, method = names[0].partition("-")[0], names[0].partition("/")[2]
    sizes = [name.removeprefix(f"{corpus}-").partition("/")[0] for name in names]
    return f"{corpus}-{{{','.join(sizes)}}}/{method}"


def _tokens(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count:,}"
