"""Peak memory, speed and losses of LLaMA 7B and 1B on an accelerator, with its memory limited.

``python -m benchmarks.memory.gpu`` trains from random weights in bfloat16 on real tokens, each run
in a process of its own whose allocator has 24 GB and then 16 GB, and writes
``benchmarks/results/gpu_memory.json``, row by row. ``--estimate`` needs no accelerator: it writes
what ``examples/llama/memory/step_memory.py`` predicts, marked as estimates.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.command_line import run_from_command_line
from benchmarks.memory import gpu_target

if __name__ == "__main__":  # This process has no use for the device, and holds no memory of it.
    from examples.llama.memory.xla_flags import MEMORY_FLAGS, add_flags

    if "--compile-for-a100" in sys.argv:
        gpu_target.prepare()
    os.environ["JAX_PLATFORMS"] = "cpu"
    add_flags(MEMORY_FLAGS)

from benchmarks.common.child import call
from benchmarks.common.environment import RESULTS, environment, write_results
from benchmarks.common.result_files import write
from examples.llama.__main__ import parse
from examples.llama.memory.sizes import parse_bytes
from examples.llama.memory.step_memory import of_compiled, predict, resident
from examples.llama.plan.candidates import STEPS, has_rank, optimizer_arguments
from examples.llama.training.build import abstract_run

TINY_RANK = 8
TINY = {"layers": "2", "hidden": "32", "intermediate": "48"}
PRESETS = {
    "7b": ["--preset", "7b"],
    "1b": ["--preset", "1b"],
    "tiny": [x for k, v in TINY.items() for x in (f"--model.{k}", v)],
}
METHODS = (
    "adamw",
    "adamw-8bit",
    "galore@moment_bits=8",
    "natural-galore",
    "natural-galore@moment_bits=8",
    "natural-galore@moment_bits=8,basis_dtype=int8",
    "lean-natural-galore",
    "lean-natural-galore@rank=16",
    "lean-natural-galore@rank=16,weight_bits=8",
)


class Case(NamedTuple):
    """A run."""

    preset: str
    method: str
    step: str  # "ordinary", "remat" or "per layer"
    rows: int  # of the batch
    arguments: list[str]  # of the program


def cases(
    presets: Sequence[str],
    methods: Sequence[str],
    data: tuple[str, ...],
    seq_len: int,
    large_batch: int,
    interval: int,
    more: list[str],
) -> Iterator[Case]:
    """One row with and without updates per layer, then a large batch, with layers recomputed.

    Weights in 8 bits have updates per layer alone.
    """
    for preset in presets:
        small, large = (1, ("ordinary", "per layer")), (large_batch, ("remat", "per layer"))
        for rows, steps in (small, large) if large_batch else (small,):
            for method in methods:
                for step in steps:
                    if "weight_bits=" in method and step != "per layer":
                        continue
                    base = [*PRESETS[preset], *more]
                    rank = None
                    if has_rank(method) and "rank=" not in method:
                        rank = TINY_RANK if preset == "tiny" else parse(base).optimizer.rank
                        # A quarter of the width, as in GaLore's paper, and a sixteenth.
                        rank = max(1, rank // 4) if method == "lean-natural-galore" else rank
                    arguments = [*base, *optimizer_arguments(method, rank), "--data", *data]
                    arguments += ["--interval", str(interval)] if has_rank(method) else []
                    arguments += ["--batch-size", str(rows), "--seq-len", str(seq_len)]
                    arguments += ["--model.dtype", "bfloat16", "--model.param-dtype", "bfloat16"]
                    arguments += ["--model.stacked", *STEPS[step]]
                    yield Case(preset, method, step, rows, arguments)


def main(
    presets: tuple[str, ...] = ("7b", "1b"),
    methods: tuple[str, ...] = METHODS,
    limits: tuple[str, ...] = ("24GB", "16GB"),
    seq_len: int = 256,
    large_batch: int = 16,
    steps: int = 30,
    interval: int = 10,
    timed: str = "1b",
    data: tuple[str, ...] = ("sotu",),
    vocab_size: int | None = None,
    cache_dir: Path = Path(".cache/llama"),
    estimate: bool = False,
    compile_for_a100: bool = False,
    allow_cpu: bool = False,
    output: Path = RESULTS / "gpu_memory.json",
) -> dict[str, Any]:
    """Measure training steps on an accelerator.

    Args:
      presets: of ``examples.llama``, or tiny.
      methods: NAME or NAME@OPTION=VALUE,... of ``examples.llama``.
      limits: of the device's memory.
      seq_len: tokens in a row.
      large_batch: rows of the larger batch, 0 for none; the other one has one row.
      steps: of each run.
      interval: between refreshes, so that there are some.
      timed: the preset at which the update alone is timed beside optax.adamw's; none: no timing.
      data: text, as for ``examples.llama``.
      vocab_size: of the tokenizer; by default the preset's.
      cache_dir: where tokens are kept.
      estimate: predict the bytes, and run nothing.
      compile_for_a100: with the estimates, what XLA's compiler for GPUs reserves: minutes a step;
        see ``gpu_target.py`` for what it needs.
      allow_cpu: run without an accelerator, whose memory then is neither limited nor measured.
      output: where the results go.
    """
    more = ["--cache-dir", str(cache_dir)]
    more += [] if vocab_size is None else ["--vocab-size", str(vocab_size)]
    device = {} if estimate else _child("device", {}, None)
    if device.get("platform") == "cpu" and not allow_cpu:
        sys.exit("error: no accelerator here; --estimate predicts, --allow-cpu runs on the CPU")
    capacity = device.get("bytes_limit")
    rows = []
    results = {
        "environment": environment(seed=0),
        "measured_on": None if estimate else device,
        "estimates_only": estimate,
        "steps": rows,
        "update_s": {},
    }
    before = {} if estimate else _measured(output, device)
    for case in cases(presets, methods, data, seq_len, large_batch, interval, more):
        row = case._asdict() | {"tokens": case.rows * seq_len}
        if estimate:
            run = abstract_run(parse(case.arguments))
            memory = predict(run.config, run=run)
            fits = {limit: memory.total <= parse_bytes(limit) for limit in limits}
            rows.append({**row, "estimated_bytes": memory.to_dict(), "estimated_to_fit": fits})
            if compile_for_a100:
                compiled = gpu_target.compile_for_a100(run)
                on_gpu = of_compiled(compiled, run.state, run.tx, run.config.per_layer)
                rows[-1]["compiled_for_a100_bytes"] = None if on_gpu is None else on_gpu.to_dict()
            print(_line(rows[-1]), flush=True)
            write(results, output, allow_nan=True)
            continue
        kept = resident(abstract_run(parse(case.arguments)))
        for limit in limits if capacity else (None,):
            row["limit"] = limit
            if limit and sum(kept.parts.values()) > parse_bytes(limit):
                result = {"out_of_memory": "weights and optimizer state alone are larger"}
            else:
                arguments = {"arguments": case.arguments, "steps": steps}
                result = before.get(_key(case.arguments, limit, steps))
                result = result or _child("train", arguments, _fraction(limit, capacity))
            rows.append({**row, "steps": steps, **result})
            print(_line(rows[-1]), flush=True)
            write(results, output, allow_nan=True)
    if not estimate and timed in presets:
        for case in cases((timed,), methods, data, seq_len, 1, interval, more):
            if case.step == "ordinary":
                arguments = {"arguments": case.arguments, "steps": 2 * interval}
                results["update_s"][case.method] = _child("update", arguments, None)
                write(results, output, allow_nan=True)
                print(f"update of {case.method}: {results['update_s'][case.method]}", flush=True)
    write_results(results, output)
    return results


def _measured(output: Path, device: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that an earlier start has measured on such a device: a start goes on where it was."""
    if not output.exists():
        return {}
    made = json.loads(output.read_text())
    rows = made["steps"] if made["measured_on"] == device else []
    return {_key(row["arguments"], row["limit"], row["steps"]): row for row in rows}


def _key(arguments: Sequence[str], limit: str | None, steps: int) -> str:
    return json.dumps([*arguments, limit, steps])


def _child(task: str, arguments: dict[str, Any], fraction: float | None) -> dict[str, Any]:
    """A task of ``gpu_run`` in a process whose allocator has a share of the device's memory."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    if fraction is None:  # As much as it takes.
        env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    else:
        env |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.4f}"}
    return call("benchmarks.memory.gpu_run:run", env=env, task=task, arguments=arguments)


def _fraction(limit: str | None, capacity: int | None) -> float | None:
    """Of the whole device; ``capacity`` is what 0.95 of it are. None: no limit."""
    if limit is None or capacity is None:
        return None
    fraction = parse_bytes(limit) / (capacity / 0.95)
    return fraction if fraction < 0.95 else None


def _line(row: dict[str, Any]) -> str:
    text = f"{row['preset']:5}{row['method']:42} {row['step']:10}{row['tokens']:6} tokens  "
    if "estimated_bytes" in row:
        text += f"estimate {row['estimated_bytes']['total'] / 1e9:.2f} GB"
        on_gpu = row.get("compiled_for_a100_bytes")
        return text if on_gpu is None else f"{text}, compiled {on_gpu['total'] / 1e9:.2f} GB"
    text += f"limit {row['limit']}  "
    if "out_of_memory" in row:
        return text + "out of memory"
    peak = row["peak_bytes_in_use"]
    peak = "not measured" if peak is None else f"{peak / 1e9:.2f} GB"
    return f"{text}peak {peak}  {row['tokens_per_second']:.0f} tokens/s  {row['losses'][-1]:.3f}"


if __name__ == "__main__":
    run_from_command_line(main)
