"""Command line: versions and devices, and the memory of optimizer states for a model."""

import argparse
import collections
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib
import optax

import natgalore_jax as ng
from natgalore_jax._src.memory.compare import compare_memory, format_comparison
from natgalore_jax._src.memory.llama_sizes import LLAMA_RANKS, LLAMA_SIZES, llama_shapes
from natgalore_jax._src.memory.shapes_file import DTYPES, read_shapes
from natgalore_jax._src.params.plan import SIDES


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    given = [f"--{name}" for name in ("rank", "dtype", "side") if getattr(options, name)]
    has_model = options.preset is not None or options.shapes is not None
    if given and not has_model:
        parser.error(f"{given[0]} needs a model, --preset or --shapes")
    try:
        memory = [_memory(options)] if has_model else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n\n".join([_environment(), *memory]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m natgalore_jax",
        description="Print versions and devices; given a model, the memory of optimizer states.",
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=LLAMA_SIZES, help="a LLaMA of the GaLore papers")
    model.add_argument(
        "--shapes",
        metavar="FILE.json",
        help='names and shapes of the parameters, {"mlp": {"kernel": [512, 2048]}, "scale": '
        '{"shape": [512], "dtype": "float32"}}',
    )
    parser.add_argument(
        "--rank", type=_rank, help="of the subspaces; GaLore's for a preset, or else 128"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of parameters; bfloat16 for a preset, or else float32"
    )
    parser.add_argument("--side", choices=SIDES, help="which side is projected (default: short)")
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
    except RuntimeError as error:  # jax without a working backend is part of the diagnosis
        return _lines([*rows, ["devices", f"none, {error}"]])
    kinds = collections.Counter((d.platform, d.device_kind) for d in devices)
    for (backend, kind), count in kinds.items():
        rows.append(["devices", f"{count} × {backend}" + (f", {kind}" if kind != backend else "")])
    return _lines(rows)


def _lines(rows: list[list[str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _memory(options: Any) -> str:
    if options.preset is not None:
        params = llama_shapes(LLAMA_SIZES[options.preset], options.dtype or "bfloat16")
        name, rank = f"LLaMA {options.preset}", options.rank or LLAMA_RANKS[options.preset]
    else:
        params = read_shapes(options.shapes, options.dtype or "float32")
        name, rank = options.shapes, options.rank or 128
    side = options.side or "short"
    reports = compare_memory(params, rank, side)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return "\n\n".join(
        [
            f"{name}: {count:,} parameters; rank {rank}, side {side}",
            format_comparison(reports),
            "Natural GaLore, by parameter:",
            str(reports["Natural GaLore"]),
        ]
    )


if __name__ == "__main__":
    main()
