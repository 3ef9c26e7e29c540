"""Operations and bytes sent of one update on eight devices, over an analytic lower bound.

``python -m benchmarks.distributed.sharding`` compiles the update of a step without a refresh, and
the whole one, for eight simulated devices, from shapes alone, and reads operations and collectives
of one device from the programs. Lower bounds ("floors") for a stack of L matrices m × n, m ≤ n, at
rank r on k devices:

* operations: 4 L m n r / k, the projection and the way back;
* sent by one device: nothing if the layers are sharded, (k − 1) / k · L m r to gather P if the
  longer side is, 2 (k − 1) / k · L r n to sum R and gather the low-rank update if the shorter is.

In a ring of k devices each sends (k − 1) / k of an array for an all-gather or a reduce-scatter, and
twice as much for an all-reduce. Arrays are float32, in which CPUs compute.
"""

from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # Before jax is imported.
    from examples.llama.memory.xla_flags import simulate_devices

    simulate_devices(8)

import jax
import jax.numpy as jnp

import natgalore_jax as ng
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write_results
from benchmarks.common.markdown import table
from benchmarks.common.shapes import LLAMA_RANKS, llama_shapes
from benchmarks.distributed.collectives import sent_bytes

DEVICES, FLOAT32 = 8, 4
LIMIT = 1.2
SCHEMES = ("layers", "longer side", "shorter side")
OPTIMIZERS = {"natural_galore_adamw": ng.natural_galore_adamw, "galore_adamw": ng.galore_adamw}


def main(
    preset: Literal["60m", "350m", "7b"] = "350m",
    rank: int | None = None,
    output: Path = RESULTS / "sharding.json",
) -> dict[str, Any]:
    """Compile updates of sharded models and compare them with lower bounds.

    Args:
      preset: of examples.llama, with axes that eight devices divide.
      rank: by default that of the GaLore paper.
      output: where the results go.
    """
    if rank is None:
        rank = LLAMA_RANKS[preset]
    rows = [row(preset, rank, scheme, name) for scheme in SCHEMES for name in OPTIMIZERS]
    targets = []
    for r in rows:
        what = f"{r['optimizer']}, {r['scheme']}"
        targets.append(target(f"{what}: operations / floor", r["flops"] / r["flops_floor"], LIMIT))
        if r["sent_floor"]:
            ratio = r["sent"] / r["sent_floor"]
            targets.append(target(f"{what}: bytes sent / floor", ratio, LIMIT))
    result = {
        "environment": environment(0),
        "preset": preset,
        "rank": rank,
        "devices": DEVICES,
        "rows": rows,
        "targets": targets,
    }
    write_results(result, output)
    print(costs_table(rows))
    print_targets(targets)
    return result


def row(preset: str, rank: int, scheme: str, optimizer: str) -> dict[str, Any]:
    """One scheme and optimizer: programs compiled, operations and bytes read."""
    mesh = jax.make_mesh((DEVICES,), ("x",))
    tx = OPTIMIZERS[optimizer](1e-2, rank=rank)
    shapes = llama_shapes(preset)
    params = jax.tree.map(lambda x: _on(mesh, x.shape, spec(scheme, x.shape)), shapes)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, jax.tree.map(lambda x: _on(None, x.shape, None), shapes)),
        ng.training.state_shardings(tx, params),
    )
    steps = ng.training.low_rank_steps(tx)

    def without_refresh(grads, state, params):
        full = grads if steps.needs_full else None
        return steps.update(steps.project(grads, state), state, params, full=full)

    with jax.set_mesh(mesh):
        ordinary, whole = (
            _compiled(f, params, state, params) for f in (without_refresh, tx.update)
        )
    memory = ordinary.memory_analysis()
    flops_floor, sent_floor = floors(tx, shapes, scheme, rank)
    sent = sent_bytes(ordinary.as_text(), DEVICES)
    return {
        "scheme": scheme,
        "optimizer": optimizer,
        "flops": ordinary.cost_analysis()["flops"],
        "flops_floor": flops_floor,
        "sent": sent,
        "sent_floor": sent_floor,
        "sent_in_a_round": sent_bytes(whole.as_text(), DEVICES) - sent,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def spec(scheme: str, shape: tuple[int, ...]) -> jax.P:
    """Of stacked matrices as the scheme says; of everything else its largest axis."""
    if len(shape) == 3:
        axis = {
            "layers": 0,
            "longer side": 1 if shape[1] > shape[2] else 2,
            "shorter side": 2 if shape[1] > shape[2] else 1,
        }[scheme]
    else:
        axis = shape.index(max(shape))
    return jax.P(*("x" if a == axis else None for a in range(len(shape))))


def floors(tx: Any, shapes: Any, scheme: str, rank: int) -> tuple[float, float]:
    """Operations and sent bytes of one device; see the head of this file."""
    share = (DEVICES - 1) / DEVICES
    flops = sent = 0.0
    for p in ng.memory_report(tx, shapes).parameters:
        if p.projected:
            m, n = sorted(p.shape[-2:])
            r = min(rank, m)
            flops += 4 * p.layers * m * n * r / DEVICES
            if scheme == "longer side":
                sent += FLOAT32 * share * p.layers * m * r
            elif scheme == "shorter side":
                sent += FLOAT32 * 2 * share * p.layers * r * n
    return flops, sent


def costs_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    header = (
        *("divided", "optimizer", "GFLOP", "/ floor", "MB sent", "/ floor"),
        *("MB more for a round of refreshes", "MB of arguments", "MB temporary"),
    )
    return table(
        header,
        (
            [
                r["scheme"],
                f"`{r['optimizer']}`",
                f"{r['flops'] / 1e9:.1f}",
                f"{r['flops'] / r['flops_floor']:.2f}",
                f"{r['sent'] / 1e6:.1f}",
                f"{r['sent'] / r['sent_floor']:.2f}" if r["sent_floor"] else "floor is 0",
                *(f"{r[k] / 1e6:.0f}" for k in ("sent_in_a_round", "arguments", "temporary")),
            ]
            for r in rows
        ),
    )


def _compiled(update: Any, *args: Any) -> Any:
    return jax.jit(update, donate_argnums=1).lower(*args).compile()


def _on(mesh: Any, shape: tuple[int, ...], spec: Any) -> jax.ShapeDtypeStruct:
    sharding = None if mesh is None else jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


if __name__ == "__main__":
    run_from_command_line(main)
