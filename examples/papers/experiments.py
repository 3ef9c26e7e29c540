"""The experiments of the GaLore and Natural GaLore papers, by name.

An experiment is a command line of one of the programs. Where the papers take the best of several
rates, or compare several settings, it has variants: the runs of a sweep.

What the papers leave open is chosen here: the rates of methods that they tuned (all five), the
points of the ablations that they only plot, and the micro-batches of one device.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from natgalore_jax._src.memory.llama_sizes import LLAMA_RANKS

Arguments = tuple[str, ...]

LLAMA, ENCODER, PLANNER = "examples.llama", "examples.finetune.encoder", "examples.finetune.planner"
GLUE = ("cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp")


class Experiment(NamedTuple):
    """Runs of one program."""

    program: str
    source: str  # where it is in the papers
    arguments: Arguments
    variants: Mapping[str, Arguments] = {"": ()}

    def runs(self, name: str) -> dict[str, Arguments]:
        """Command lines by name of the run."""
        found: dict[str, Arguments] = {}
        for variant, more in self.variants.items():
            run = "-".join([name.replace("/", "-"), *([variant] if variant else [])])
            place = ("--root", "runs/papers", "--name", run)
            found[run] = (*self.arguments, *more, *place)
        return found


def _words(text: str) -> Arguments:
    return tuple(text.split())


# One document a row, cut and padded, from a shuffled stream; evaluated on about 10M tokens.
C4 = _words(
    "--data hf:allenai/c4:en --tokenizer t5-base --rows documents --shuffle 1000 "
    "--held-out 50000 --seed 42 --eval-every 1000 --save-every 1000 --log-every 10"
)
BF16 = _words("--model.stacked --model.dtype bfloat16 --model.param-dtype bfloat16")
# Rows of a micro-batch, and micro-batches of a step of 512 rows.
MICRO_BATCHES = {"60m": (256, 2), "130m": (256, 2), "350m": (128, 4), "1b": (16, 32), "7b": (8, 64)}


def _rates(*rates: str) -> dict[str, Arguments]:
    return {f"lr{rate}": ("--learning-rate", rate) for rate in rates}


_TUNED = _rates("0.01", "0.005", "0.001", "0.0005", "0.0001")
_FULL_RANK = _words("--optimizer adamw --unprojected-ratio 1")
_GALORE = _words("--optimizer published-galore --scale 0.25 --interval 200 --learning-rate 0.01")
_NATURAL = _words("--optimizer paper-natural-galore --scale 0.25 --interval 200")


def _pretraining(size: str, source: str, arguments: Arguments, **more) -> Experiment:
    rows, number = MICRO_BATCHES[size]
    base = _words(f"--preset {size} --batch-size {rows} --accumulate {number}")
    return Experiment(LLAMA, source, (*base, *C4, *BF16, *arguments), **more)


def _c4(size: str) -> Iterable[tuple[str, Experiment]]:
    """Table 2 of the GaLore paper, table 1 of the Natural GaLore paper."""

    def experiment(method: str, arguments: Arguments, **more) -> tuple[str, Experiment]:
        source = "GaLore, table 2; Natural GaLore, table 1"
        return f"c4-{size}/{method}", _pretraining(size, source, arguments, **more)

    rank = f"--adapter.rank {LLAMA_RANKS[size]}"
    yield experiment("full-rank", _FULL_RANK, variants=_TUNED)
    yield experiment("galore", _GALORE)
    yield experiment("natural-galore", _NATURAL, variants=_TUNED)
    for kind in ("factorised", "lora", "relora"):
        adapter = (*_FULL_RANK, *_words(f"--adapter.kind {kind} {rank} --adapter.alpha 32"))
        yield experiment(kind, adapter, variants=_TUNED)


def _c4_7b() -> Iterable[tuple[str, Experiment]]:
    """Section 3 of the GaLore paper, table 3 of Natural GaLore's first version: one run each."""
    source = "GaLore, section 3"
    galore = "--optimizer galore --moment-bits 8 --scale 0.25 --interval 500 --learning-rate 0.005"
    clip = ("--clip-norm", "1.0")
    adam = _words("--optimizer adamw-8bit --unprojected-ratio 1 --learning-rate 0.0005")
    natural = _words("--optimizer natural-galore --moment-bits 8 --interval 500")
    yield "c4-7b/galore-8bit", _pretraining("7b", source, (*_words(galore), *clip))
    yield "c4-7b/adam-8bit", _pretraining("7b", source, (*adam, *clip))
    first_version = "Natural GaLore, first version, table 3"
    yield "c4-7b/natural-galore-8bit", _pretraining("7b", first_version, (*natural, *clip))
    # On one device of 24 GB; the norm of all gradients is never there to be clipped.
    per_layer = _words("--per-layer --batch-size 16 --accumulate 32 --accumulate-in-subspace")
    yield (
        "c4-7b/galore-8bit-per-layer",
        _pretraining("7b", "GaLore, figure 1", (*_words(galore), *per_layer)),
    )


def _ablations() -> Iterable[tuple[str, Experiment]]:
    """Figure 5 of the papers: curves without numbers."""
    intervals = {
        f"rank{rank}-interval{interval}": _words(f"--rank {rank} --interval {interval}")
        for rank in (128, 256, 512)
        for interval in (10, 50, 100, 200, 500, 1000)
    }
    ranks = {
        f"rank{rank}-steps{steps}": _words(f"--rank {rank} --steps {steps}")
        for rank in (128, 256, 512)
        for steps in (20_000, 40_000, 60_000, 80_000)
    }
    for name, variants in {"interval": intervals, "rank": ranks}.items():
        yield (
            f"ablation-130m/{name}",
            _pretraining("130m", "Natural GaLore, figure 5", _GALORE, variants=variants),
        )


def _inner_optimizers() -> Iterable[tuple[str, Experiment]]:
    """Figure 3 of the papers: 10,000 steps of the 1b model."""
    full = {
        "adam": "adamw",
        "adam-8bit": "adamw-8bit",
        "adafactor": "adafactor",
    }
    inside = {
        "galore-adam": "galore",
        "galore-adam-8bit": "galore --moment-bits 8",
        "galore-adafactor": "galore-adafactor",
    }
    ranks = {f"rank{rank}": ("--rank", str(rank)) for rank in (512, 1024)}

    def experiment(name: str, optimizer: str, rates: str, **more) -> tuple[str, Experiment]:
        arguments = _words(f"--steps 10000 --optimizer {optimizer} {rates}")
        source = "Natural GaLore, figure 3"
        return f"inner-1b/{name}", _pretraining("1b", source, arguments, **more)

    for name, optimizer in full.items():
        yield experiment(name, optimizer, "--unprojected-ratio 1 --learning-rate 0.001")
    for name, optimizer in inside.items():
        yield experiment(name, optimizer, "--scale 0.25 --learning-rate 0.01", variants=ranks)


def _throughput() -> Iterable[tuple[str, Experiment]]:
    """Table 7 of the GaLore paper: memory and tokens per second with one row of 256 tokens."""
    methods = {
        "adamw": "--optimizer adamw",
        "adafactor": "--optimizer adafactor",
        "adam-8bit": "--optimizer adamw-8bit",
        "galore-8bit": "--optimizer galore --moment-bits 8 --rank 1024",
    }
    variants = {
        f"{name}{suffix}": _words(f"{optimizer} {step}")
        for step, suffix in (("", ""), ("--per-layer", "-per-layer"))
        for name, optimizer in methods.items()
    }
    short = _words("--steps 50 --batch-size 1 --accumulate 1 --held-out 100 --log-every 1")
    yield (
        "throughput-1b",
        _pretraining("1b", "GaLore, table 7", short, variants=variants),
    )


def _glue() -> Iterable[tuple[str, Experiment]]:
    """Tables 3 and 6 of the GaLore paper; table 2 of the Natural GaLore paper."""
    tasks = {task: ("--task", task) for task in GLUE}
    swept = {
        f"{task}-{name}": (*arguments, *rate)
        for task, arguments in tasks.items()
        for name, rate in _rates("1e-5", "2e-5", "3e-5").items()
    }
    for rank in (4, 8):
        preset = _words(f"--preset galore-rank-{rank}")
        yield f"glue/galore-rank-{rank}", Experiment(ENCODER, "GaLore, table 3", preset, tasks)
    full, lora = ("adamw", 4), ("lora", 4)
    for name, (method, rank) in {
        "full": full,
        "lora-rank-4": lora,
        "lora-rank-8": ("lora", 8),
        "natural-galore-rank-4": ("published-natural-galore", 4),
        "natural-galore-rank-8": ("published-natural-galore", 8),
    }.items():
        arguments = _words(f"--preset natural-galore-rank-{rank} --methods {method}")
        # α / r of LoRA instead of GaLore's factor.
        arguments += ("--scale", "2") if method == "lora" else ()
        yield f"glue/{name}", Experiment(ENCODER, "Natural GaLore, table 2", arguments, swept)


def _tinyagent() -> Iterable[tuple[str, Experiment]]:
    """Table 3 of the Natural GaLore paper. The file of the records is given with --data."""
    base = _words(
        "--dataset tinyagent --skip-unusable --held-out 0.025 --epochs 3 --batch-size 4 "
        "--accumulate 8 --learning-rate 7e-5 --dtype bfloat16 --remat "
        "--model Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct"
    )
    for method in ("lora", "paper-natural-galore", "published-natural-galore"):
        arguments = (*base, "--methods", method)
        yield f"tinyagent/{method}", Experiment(PLANNER, "Natural GaLore, table 3", arguments)


EXPERIMENTS: dict[str, Experiment] = {
    **{name: e for size in ("60m", "130m", "350m", "1b") for name, e in _c4(size)},
    "c4-1b/galore-rank-1024": _pretraining("1b", "GaLore, table 2", (*_GALORE, "--rank", "1024")),
    **dict(_c4_7b()),
    **dict(_ablations()),
    **dict(_inner_optimizers()),
    **dict(_throughput()),
    **dict(_glue()),
    **dict(_tinyagent()),
}
