"""Continued training: SmolLM2-135M learns a text, and how much it forgets of others.

``python -m benchmarks.finetuning.continued sweep`` makes all runs and continues after a stop. The
text is presidential addresses, mostly of the nineteenth century; what is forgotten is measured on
snippets of movie reviews, which no method trains on.
"""

import dataclasses
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from flax import nnx

from benchmarks.common.environment import RESULTS
from benchmarks.common.markdown import mean_and_spread, table
from benchmarks.common.result_files import Json, read_suite, write
from benchmarks.finetuning import grids
from benchmarks.pretraining.train import excerpt, finite, outcome
from examples.common.optimizers import OptimizerConfig
from examples.finetune.encoder.data import read_rows
from examples.finetune.encoder.data.tasks import TASKS
from examples.llama.data import eval_batches, load_splits
from examples.llama.data.tokenizer import encode
from examples.llama.loop import train
from examples.llama.model.adapters import AdapterConfig
from examples.llama.run_config import OutputConfig, RunConfig, run_preset
from examples.llama.training.evaluate import make_eval_step, mean_nll
from examples.llama.training.train_step import Apply
from examples.llama.weights.files import load_llama
from examples.llama.weights.initial import start_from

UNTRAINED = "untrained"
# Of embedding and norms, the same for all methods: it is not what is compared.
UNPROJECTED_RATE = 3e-5
RANK = 64


class Method(NamedTuple):
    """A method, and the rates of the hidden matrices that it is tuned over."""

    optimizer: OptimizerConfig
    rates: tuple[float, ...]
    scale: float = 1.0  # Of the update of hidden matrices, beside the learning rate.
    adapter: AdapterConfig = AdapterConfig()


def _optimizer(name: str, **settings: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, rank=RANK, update_interval=20, **settings)


_LOW = (1e-4, 3e-4, 1e-3)
METHODS = {
    "adamw": Method(OptimizerConfig(name="adamw"), (3e-5, 1e-4, 3e-4)),
    "lora": Method(
        OptimizerConfig(name="adamw"),
        (3e-4, 1e-3, 3e-3),
        adapter=AdapterConfig(kind="lora", rank=RANK, alpha=RANK),
    ),
    "galore": Method(_optimizer("galore"), _LOW, 0.25),
    "fira": Method(_optimizer("fira"), _LOW, 0.25),
    "natural-galore": Method(_optimizer("natural-galore"), _LOW),
    "lean-natural-galore": Method(
        OptimizerConfig(name="lean-natural-galore", rank=RANK // 2, update_interval=20), _LOW
    ),
}
GRIDS = {name: method.rates for name, method in METHODS.items()}

if TYPE_CHECKING:
    MethodName = str
else:  # The names that the command line offers.
    MethodName = Literal[(UNTRAINED, *METHODS)]


@dataclass(frozen=True, kw_only=True)
class Common(grids.Suite):
    """Options common to all runs of a suite."""

    model: str = "smollm2-135m-instruct"
    """The model, as --init-from of examples.llama."""
    data: tuple[str, ...] = ("sotu",)
    """The text that it is trained on, as in examples.llama."""
    steps: int = 60
    """Optimizer steps."""
    batch_size: int = 4
    """Rows of a step."""
    seq_len: int = 256
    """Tokens of a row."""
    eval_tokens: int = 8192
    """Tokens of each text that a loss is the mean of."""
    root: Path = RESULTS / "continued"
    """Directory of all suites."""


@dataclass(frozen=True, kw_only=True)
class Run(Common, grids.RunOptions):
    """Make one run and write its file."""

    method: MethodName = "natural-galore"
    """Method that trains the model; `untrained` evaluates it alone."""
    learning_rate: float = 1e-4
    """Peak learning rate of the hidden matrices."""

    def config(self) -> RunConfig:
        """The configuration of the program."""
        config = run_preset("nano")
        config = dataclasses.replace(
            config,
            init_from=self.model,
            data=dataclasses.replace(config.data, data=self.data),
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            seed=self.seed,
            model=dataclasses.replace(config.model, stacked=True),
            output=OutputConfig(eval_every=self.steps),
        )
        if self.method == UNTRAINED:
            return config
        method = METHODS[self.method]
        rate = self.learning_rate / method.scale
        optimizer = dataclasses.replace(
            method.optimizer, learning_rate=rate, unprojected_ratio=UNPROJECTED_RATE / rate
        )
        return dataclasses.replace(config, optimizer=optimizer, adapter=method.adapter)

    def configuration(self) -> Json:
        """The configuration that a file of the run must have been made with."""
        return self.config().to_dict() | {"eval_tokens": self.eval_tokens}


@dataclass(frozen=True, kw_only=True)
class Sweep(Common, grids.SweepOptions):
    __doc__ = grids.SweepOptions.__doc__
    grids = GRIDS
    methods: tuple[MethodName, ...] = tuple(METHODS)
    """Methods that train the model."""


@dataclass(frozen=True, kw_only=True)
class Show(grids.Suite):
    """Print a suite: mean ± standard deviation over the seeds."""

    root: Path = Common.root
    """Directory of all suites."""


def make(run: Run) -> Json | None:
    """Train and write the file; None if it was there already."""
    begin = time.perf_counter()
    if grids.is_done(run):
        return None
    start = start_from(run.config())
    config = start.config
    splits = load_splits(config.data, start.tokenizer)
    general = encode(start.tokenizer, general_texts())
    held_out = {"validation": splits.validation, "test": splits.test, "general": general}
    held_out = {name: excerpt(x, run.eval_tokens, run.seq_len) for name, x in held_out.items()}
    record = grids.record_of(run) | {
        "text": {"fingerprint": splits.fingerprint, "tokens": len(splits.train)},
    }
    if run.method == UNTRAINED:
        graphdef, params = nnx.split(load_llama(run.model).model)
        found: Json = {"diverged": False}
        apply: Apply = lambda params, rows: nnx.merge(graphdef, params)(rows)  # noqa: E731
    else:
        # Nothing but the test at the end: each evaluation takes as long as several steps.
        few = held_out["validation"][: run.seq_len + 1]
        given = dataclasses.replace(splits, validation=few, test=few)
        result = train(config, splits=given, initial=start.weights)
        apply, params, found = result.apply, result.weights, outcome(result)
    loss = losses_of(apply, params, held_out, run.batch_size, run.seq_len)
    seconds = {"wall_seconds": round(time.perf_counter() - begin, 1)}
    record |= found | {"loss": loss} | seconds
    write(record, run.path)
    return record


def general_texts() -> list[str]:
    """Movie reviews of the test split of `movie-snippets`, joined to one document."""
    task = TASKS["movie-snippets"]
    rows = read_rows(task, None).splits[task.held_out[-1]]
    return ["\n".join(row.first for row in rows)]


def losses_of(
    apply: Apply, params: Any, texts: dict[str, np.ndarray], batch_size: int, seq_len: int
) -> dict[str, float | None]:
    """Mean loss of each text, in nats per token."""
    step = make_eval_step(apply)
    found = {}
    for name, tokens in texts.items():
        loss = mean_nll(step, params, eval_batches(tokens, batch_size, seq_len))
        assert loss is not None, "nothing stops it"
        found[name] = finite(loss)
    return found


def runs(sweep: Sweep) -> list[grids.RunOptions]:
    """The runs that are known by now: of the tuning, and of methods whose tuning is complete."""
    planned = grids.maker(sweep, Common, Run)
    trained = (r for r in read_suite(sweep.root, sweep.suite) if r["method"] != UNTRAINED)
    tuned = grids.tuning_losses(trained, lambda r: r["loss"]["validation"])
    first = planned(UNTRAINED, 0.0, grids.TUNE_SEED)
    return [first, *grids.plan(sweep, tuned, planned)]


_COLUMNS = (
    *("", "rate", "seeds", "state, MiB", "addresses", "movie reviews"),
    *("addresses - AdamW's", "movie reviews - AdamW's", "minutes, fastest run"),
)


def results_table(records: list[Json]) -> str:
    """Markdown; test losses of each method, after those of the model before training.

    Methods whose tuning has no further seeds yet are shown by the best run of their tuning. A seed
    moves the losses of all methods together: the differences are to AdamW's run with the same seed,
    that of the tuning included.
    """
    tuning = [r for r in records if r["method"] != UNTRAINED]
    tuned = grids.tuning_losses(tuning, lambda r: r["loss"]["validation"])
    rows = []
    for r in records:
        if r["method"] == UNTRAINED:
            losses = (f"{r['loss'][name]:.3f}" for name in ("test", "general"))
            rows.append([UNTRAINED, *[None] * 3, *losses])
    rates = grids.best_rates(tuned)
    at_best: dict[str, list[Json]] = defaultdict(list)
    for r in tuning:
        if r["learning_rate"] == rates.get(r["method"]):
            at_best[r["method"]].append(r)
    reference = {r["seed"]: r["loss"] for r in grids.finished(at_best["adamw"])}
    for method, best in rates.items():
        of_best = grids.finished(at_best[method])
        seeds = [r for r in at_best[method] if r["seed"] != grids.TUNE_SEED]
        group = grids.finished(seeds) or of_best
        paired = [r for r in of_best if method != "adamw" and r["seed"] in reference]
        rows.append(
            [
                method,
                grids.rate_cell(method, best, GRIDS),
                grids.seeds_cell(seeds) if seeds else "tuning",
                f"{group[0]['state_bytes'] / 2**20:.1f}",
                *(mean_and_spread([r["loss"][n] for r in group], 3) for n in ("test", "general")),
                *(
                    mean_and_spread([r["loss"][n] - reference[r["seed"]][n] for r in paired], 3)
                    if paired
                    else ""
                    for n in ("test", "general")
                ),
                f"{min(r['training_seconds'] for r in of_best) / 60:.1f}",
            ]
        )
    rows += [[m, None, "diverged"] for m in sorted(tuned.keys() - rates.keys())]
    return table(_COLUMNS, rows)


def _outcome(record: Json) -> str:
    if record["diverged"]:
        return "diverged"
    found = ", ".join(f"{name} {loss:.3f}" for name, loss in record["loss"].items())
    return f"loss: {found}"


COMPARISON = grids.Comparison(
    "benchmarks.finetuning.continued", make, runs, _outcome, results_table
)

if __name__ == "__main__":
    sys.exit(COMPARISON.main(Run | Sweep | Show))
