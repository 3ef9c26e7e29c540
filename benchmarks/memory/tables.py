"""The memory tables of the GaLore paper, recomputed, and what the natural gradient adds to them.

``python -m benchmarks.memory.tables`` prints the tables and writes
``benchmarks/results/memory_tables.json``. No model is allocated: everything comes from shapes.
"""

import json
import math
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, write_results
from benchmarks.common.shapes import BF16, LLAMA_RANKS, llama_shapes

SIZES = ("60m", "130m", "350m", "1b")
# Rank by size in the version of the paper whose table is below; a later version has 512 at 1b.
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 1024}
METHODS = ("Full-Rank", "GaLore", "Low-Rank", "LoRA", "ReLoRA")

# Zhao et al., GaLore (2024), table 5, in "G".
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "weights": {
        "Full-Rank": (0.12, 0.25, 0.68, 2.60),
        "GaLore": (0.12, 0.25, 0.68, 2.60),
        "Low-Rank": (0.08, 0.18, 0.36, 2.12),
        "LoRA": (0.20, 0.44, 1.04, 4.74),
        "ReLoRA": (0.20, 0.44, 1.04, 4.74),
    },
    "states": {
        "Full-Rank": (0.23, 0.51, 1.37, 5.20),
        "GaLore": (0.13, 0.28, 0.54, 3.18),
        "Low-Rank": (0.17, 0.37, 0.72, 4.25),
        "LoRA": (0.17, 0.37, 0.72, 4.25),
        "ReLoRA": (0.17, 0.37, 0.72, 4.25),
    },
}

# What that table counts with, inferred from its entries: the paper does not say.
PAPER_UNIT = 1024e6  # bytes in one "G"
PAPER_PARAMETERS = {"60m": 60e6, "130m": 130e6, "350m": 350e6, "1b": 1.3 * 1024e6}


def is_hidden(path: Any, leaf: Any) -> bool:
    """The matrices of attention and feed-forward network: what GaLore and LoRA work on."""
    return "kernel" in str(path) and "head" not in str(path)


def galore(rank: int) -> optax.GradientTransformation:
    """GaLore as published: the shorter side, Adam inside, everything in the weights' bfloat16."""
    return ng.galore_adamw(1e-2, rank=rank, side="short", method="svd", where=is_hidden)


def counts(params: Any, rank: int) -> dict[str, int]:
    """Numbers of elements: all, those in the embedding and the head, those of the adaptors B, A."""
    report = ng.memory_report(galore(rank), params)
    hidden = [p for p in report.parameters if p.projected]
    tables = [p for p in report.parameters if not p.projected and "norm" not in p.path]
    return {
        "parameters": sum(math.prod(p.shape) for p in report.parameters),
        "hidden": sum(math.prod(p.shape) for p in hidden),
        "tables": sum(math.prod(p.shape) for p in tables),
        "adaptors": sum(p.layers * rank * sum(p.shape[-2:]) for p in hidden),
    }


def exact_bytes(size: str, rank: int) -> dict[str, dict[str, int]]:
    """Bytes of weights and AdamW states in bfloat16, nothing rounded.

    Everything that is no hidden matrix is trained in full by every method.
    """
    params = llama_shapes(size)
    n = counts(params, rank)
    rest = n["parameters"] - n["hidden"]
    trained = rest + n["adaptors"]
    adamw = ng.memory_report(optax.adamw(1e-3), params).part_bytes["inner"]
    low_rank = ng.memory_report(galore(rank), params)
    full = BF16 * n["parameters"]
    states = {
        "Full-Rank": adamw,
        "GaLore": low_rank.total_state_bytes - low_rank.shared_bytes,
        **dict.fromkeys(METHODS[2:], 2 * BF16 * trained),
    }
    weights = {
        "Full-Rank": full,
        "GaLore": full,
        "Low-Rank": BF16 * trained,
        **dict.fromkeys(METHODS[3:], full + BF16 * n["adaptors"]),
    }
    return {"weights": weights, "states": states}


def paper_estimate(size: str, rank: int) -> dict[str, dict[str, float]]:
    """Table 5 in the way that its entries seem to have been computed, in "G".

    The adaptors' count A has the embedding and the head in it, GaLore's states are 1.5 A, and LoRA
    has the embedding and the head twice.
    """
    n = counts(llama_shapes(size), rank)
    N, A = PAPER_PARAMETERS[size], n["adaptors"] + n["tables"]
    weights = {"Full-Rank": N, "GaLore": N, "Low-Rank": A, "LoRA": N + A, "ReLoRA": N + A}
    states = {"Full-Rank": 2 * N, "GaLore": 1.5 * A, **dict.fromkeys(METHODS[2:], 2 * A)}
    return {
        kind: {method: round(BF16 * x / PAPER_UNIT, 4) for method, x in row.items()}
        for kind, row in (("weights", weights), ("states", states))
    }


def table_5() -> list[dict[str, Any]]:
    """One row per entry: as published, in the paper's way of counting, and exact."""
    rows = []
    for i, size in enumerate(SIZES):
        exact, estimate = exact_bytes(size, RANKS[size]), paper_estimate(size, RANKS[size])
        for kind, published in PUBLISHED.items():
            for method in METHODS:
                value = estimate[kind][method]
                rows.append(
                    {
                        "size": size,
                        "kind": kind,
                        "method": method,
                        "published": published[method][i],
                        "estimate": value,
                        "same_two_decimals": f"{value:.2f}" == f"{published[method][i]:.2f}",
                        "exact_bytes": exact[kind][method],
                    }
                )
    return rows


def table_1(m: int = 1024, n: int = 2736, rank: int = 256) -> dict[str, dict[str, int]]:
    """Table 1 for one matrix, in elements: from the state itself, and from its formulas."""
    params = {"kernel": jax.ShapeDtypeStruct((m, n), jnp.bfloat16)}
    report = ng.memory_report(galore(rank), params)
    states = report.parameters[0].state_bytes // BF16
    return {
        "measured": {"weights": report.weight_bytes // BF16, "states": states},
        "formula": {"weights": m * n, "states": m * rank + 2 * n * rank},
        "lora": {"weights": m * n + (m + n) * rank, "states": 2 * (m + n) * rank},
    }


def natural_gradient_table(history: int) -> list[dict[str, Any]]:
    """State bytes of Natural GaLore in bfloat16: the default, and with a history by side."""
    rows = []
    for size, rank in LLAMA_RANKS.items():
        params = llama_shapes(size)
        stored = ng.natural_galore(rank, history=history, where=is_hidden)
        tx = ng.chain(stored, optax.adamw(1e-2))
        report = ng.memory_report(tx, params)
        default, eight_bits = (
            ng.natural_galore_adamw(1e-2, rank=rank, where=is_hidden, moment_bits=bits)
            for bits in (None, 8)
        )
        rows.append(
            {
                "size": size,
                "rank": rank,
                "history": history,
                "weights": report.weight_bytes,
                "adamw": report.adamw_state_bytes,
                "galore": ng.memory_report(galore(rank), params).total_state_bytes,
                "default": ng.memory_report(default, params).total_state_bytes,
                "8 bits": ng.memory_report(eight_bits, params).total_state_bytes,
                "history_bytes": report.part_bytes["history"],
                **{
                    side: report.alternative_state_bytes[side] for side in ("short", "long", "both")
                },
            }
        )
    return rows


def _print_table_5(rows: list[dict[str, Any]]) -> None:
    print("Table 5, bfloat16: published G | the paper's way of counting | exact, GB (1e9 bytes)")
    for kind in PUBLISHED:
        print(f"\n{kind:10}" + "".join(f"{size:>26}" for size in SIZES))
        for method in METHODS:
            line = f"{method:10}"
            for row in rows:
                if (row["kind"], row["method"]) == (kind, method):
                    mark = " " if row["same_two_decimals"] else "*"
                    line += f"{row['published']:10.2f}{row['estimate']:7.2f}{mark}"
                    line += f"{row['exact_bytes'] / 1e9:8.3f}"
            print(line)
    print(f"\n{sum(r['same_two_decimals'] for r in rows)} of {len(rows)} entries agree; * differs")


def _print_natural(rows: list[dict[str, Any]]) -> None:
    columns = ("weights", "adamw", "galore", "default", "8 bits", "short", "long", "both")
    print(f"\nOptimizer states in GB (1e9 bytes), bfloat16, history of {rows[0]['history']}")
    print(f"{'size':6}{'rank':>6}" + "".join(f"{c:>14}" for c in columns))
    for row in rows:
        sizes = "".join(f"{row[c] / 1e9:14.3f}" for c in columns)
        print(f"{row['size']:6}{row['rank']:6}{sizes}")


def main() -> None:
    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    results = {
        "environment": versions,
        "table_1": table_1(),
        "table_5": table_5(),
        "natural_gradient": [natural_gradient_table(history) for history in (10, 20)],
    }
    print(f"Table 1, elements of a 1024 × 2736 matrix at rank 256: {results['table_1']}\n")
    _print_table_5(results["table_5"])
    for rows in results["natural_gradient"]:
        _print_natural(rows)
    path = RESULTS / "memory_tables.json"
    if path.exists() and has_numbers(path, results):
        print(f"\n{path.name} has these numbers")
    else:
        write_results(results, path)


def has_numbers(path: Path, results: dict[str, Any]) -> bool:
    """Whether a file differs from the results in its environment alone."""
    written = json.loads(path.read_text())
    return written | {"environment": None} == results | {"environment": None}


if __name__ == "__main__":
    run_from_command_line(main)
