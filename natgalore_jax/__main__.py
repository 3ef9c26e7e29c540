"""Command line: versions and devices, and the memory of optimizer states for a model."""

import argparse
import collections
import io
import platform
import sys
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jaxlib
import optax

import natgalore_jax as ng
from natgalore_jax._src.memory.compare import compare_memory, format_comparison
from natgalore_jax._src.memory.llama_sizes import LLAMA_RANKS, LLAMA_SIZES, llama_shapes
from natgalore_jax._src.memory.report import format_report
from natgalore_jax._src.params.plan import Side

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    given = [f"--{name}" for name in ("rank", "dtype", "side") if getattr(options, name)]
    if given and options.preset is None:
        parser.error(f"{given[0]} needs a model, --preset")
    try:
        memory = [] if options.preset is None else [_memory(options)]
    except ValueError as error:
        parser.error(str(error))
    if isinstance(sys.stdout, io.TextIOWrapper):  # A terminal may not have all characters.
        sys.stdout.reconfigure(errors="replace")
    print("\n\n".join([_environment(), *memory]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m natgalore_jax",
        description="Print versions and devices; given a model, the memory of optimizer states.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=LLAMA_SIZES, help="a LLaMA of the GaLore papers")
    parser.add_argument("--rank", type=_rank, help="of the subspaces (default: GaLore's)")
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters (default: bfloat16)")
    parser.add_argument(
        "--side", choices=get_args(Side), help="which side is projected (default: short)"
    )
    return parser


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a rank is a positive integer, got {text!r}")
    return int(text)


def _environment() -> str:
    rows = [
        ["natgalore_jax", ng.__version__],
        ["jax", jax.__version__],
        ["jaxlib", jaxlib.__version__],
        ["optax", optax.__version__],
        ["Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"],
    ]
    try:
        devices = jax.devices()
    # jax without a working backend is part of the diagnosis. An assertion, without a message, where
    # JAX_PLATFORMS asks for GPUs alone and none is visible.
    except (RuntimeError, AssertionError) as error:
        reason = str(error) or "JAX_PLATFORMS asks for GPUs, and none is visible"
        return _lines([*rows, ["devices", f"none, {reason}"]])
    kinds = collections.Counter((d.platform, d.device_kind) for d in devices)
    for (backend, kind), count in kinds.items():
        rows.append(["devices", f"{count} × {backend}" + (f", {kind}" if kind != backend else "")])
    return _lines(rows)


def _lines(rows: list[list[str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _memory(options: Any) -> str:
    params = llama_shapes(LLAMA_SIZES[options.preset], options.dtype or "bfloat16")
    rank, side = options.rank or LLAMA_RANKS[options.preset], options.side or "short"
    reports = compare_memory(params, rank, side)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return "\n\n".join(
        [
            f"LLaMA {options.preset}: {count:,} parameters; rank {rank}, side {side}",
            format_comparison(reports),
            "Natural GaLore, by parameter:",
            format_report(reports["Natural GaLore"], columns=80),
        ]
    )


if __name__ == "__main__":
    main()
