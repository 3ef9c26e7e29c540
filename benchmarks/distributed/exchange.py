"""Bytes that data-parallel devices sum: whole gradients, or low-rank ones.

``python -m benchmarks.distributed.exchange`` (a) compiles a training step of a LLaMA preset for
eight simulated devices, once with means of whole gradients and once with
``ng.training.data_parallel_step``, and reads the bytes of all collectives from the compiled
programs; (b) computes from shapes what that is in bfloat16 at 1b and 7b, and how long an exchange
between hosts takes: in a ring each of h hosts sends and receives 2 (h − 1) / h times the bytes.
(b) is a model: no network was used.
"""

from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Before jax is imported.
    from examples.llama.memory.xla_flags import simulate_devices

    simulate_devices(8)

import jax
import optax

import natgalore_jax as ng
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, write_results
from benchmarks.common.shapes import BF16, LLAMA_RANKS, PaperSize, llama_shapes
from benchmarks.distributed.collectives import exchanged_bytes
from examples.llama.model.config import MODEL_PRESETS, PresetName
from examples.llama.training.train_step import make_model, token_nll

DEVICES = 8
RATES = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 1e10 / 8, "100 Gbit/s": 1e11 / 8}  # bytes/s


def main(
    preset: PresetName = "nano",
    rank: int = 32,
    interval: int = 200,
    rows: int = 8,
    seq_len: int = 64,
    sizes: tuple[PaperSize, ...] = ("1b", "7b"),
    hosts: int = 8,
    output: Path = RESULTS / "exchange.json",
) -> dict[str, Any]:
    """Count what data-parallel devices exchange.

    Args:
      preset: the model that is compiled.
      rank: of its subspaces.
      interval: between refreshes.
      rows: of its batch, on all devices together.
      seq_len: tokens in a row.
      sizes: the models of the table from shapes, at the ranks of the GaLore paper.
      hosts: that exchange gradients there.
      output: where the results go.
    """
    config = MODEL_PRESETS[preset]
    apply, params = make_model(config, seed=0)
    batch = jax.random.randint(jax.random.key(0), (rows, seq_len + 1), 0, config.vocab_size)

    def loss(params, batch):
        return token_nll(apply, params, batch).mean()

    results = {
        "environment": environment(seed=0),
        "settings": {
            "preset": preset,
            "rank": rank,
            "interval": interval,
            "hosts": hosts,
            "devices": DEVICES,
        },
        "compiled": compiled_bytes(loss, params, batch, rank, interval),
        "model": {size: modelled(size, interval, hosts) for size in sizes},
    }
    _print(results)
    write_results(results, output)
    return results


def compiled_bytes(loss: Any, params: Any, batch: Any, rank: int, interval: int) -> dict[str, Any]:
    """Bytes of the collectives of both steps, by whether they are in every step."""
    mesh = jax.make_mesh(
        (DEVICES,),
        ("data",),
        devices=jax.devices()[:DEVICES],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    tx = ng.galore_adamw(1e-2, rank=rank, update_interval=interval)

    def whole(params, state, batch):
        own = jax.lax.pcast(params, "data", to="varying")
        value, grads = jax.lax.pmean(jax.value_and_grad(loss)(own, batch), "data")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    same = jax.P()
    steps: dict[str, Any] = {
        "whole gradients": jax.jit(
            jax.shard_map(
                whole, mesh=mesh, in_specs=(same, same, jax.P("data")), out_specs=(same,) * 3
            )
        ),
        "low-rank gradients": ng.training.data_parallel_step(loss, tx, mesh),
    }
    shapes = jax.eval_shape(lambda p: (p, tx.init(p), batch), params)
    found: dict[str, Any] = {}
    for name, step in steps.items():
        exchanged = exchanged_bytes(step.lower(*shapes).compile().as_text())
        found[name] = {
            "every_step_bytes": exchanged.always,
            # In loops over the layers that are due; here one of each kind.
            "refresh_bytes": exchanged.sometimes,
        }
    found["ratio"] = (
        found["low-rank gradients"]["every_step_bytes"]
        / found["whole gradients"]["every_step_bytes"]
    )
    return found


def modelled(size: str, interval: int, hosts: int) -> dict[str, Any]:
    """From shapes: bytes of an exchange in bfloat16, and seconds at several rates.

    Args:
      size: a preset.
      interval: steps in which every whole gradient is exchanged once.
      hosts: in the ring.
    """
    params = llama_shapes(size)
    rank = LLAMA_RANKS[size]
    tx = ng.galore_adamw(1e-2, rank=rank)
    low = jax.eval_shape(lambda p: ng.training.low_rank_steps(tx).project(p, tx.init(p)), params)
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(low), strict=True))
    whole = BF16 * sum(p.size for p, _ in leaves)
    every = BF16 * sum(r.size for _, r in leaves)
    not_projected = BF16 * sum(p.size for p, r in leaves if p.shape == r.shape)
    low_rank = every + (whole - not_projected) / interval
    share = 2 * (hosts - 1) / hosts
    return {
        "rank": rank,
        "whole_bytes": whole,
        "low_rank_bytes": low_rank,
        "of_which_not_projected_bytes": not_projected,
        "ratio": low_rank / whole,
        "exchange_s": {
            name: {"whole": share * whole / b, "low_rank": share * low_rank / b}
            for name, b in RATES.items()
        },
    }


def _print(results: dict[str, Any]) -> None:
    compiled, settings = results["compiled"], results["settings"]
    print(f"(a) {settings['preset']}, rank {settings['rank']}, compiled for {DEVICES} devices")
    for name in ("whole gradients", "low-rank gradients"):
        row = compiled[name]
        print(
            f"  {name:20}{row['every_step_bytes'] / 1e6:8.3f} MB every step, "
            f"{row['refresh_bytes'] / 1e6:.3f} MB in branches of a refresh"
        )
    print(f"  ratio {compiled['ratio']:.3f}")
    print(f"\n(b) model: {settings['hosts']} hosts, bfloat16")
    for size, row in results["model"].items():
        print(
            f"  {size}, rank {row['rank']}: {row['whole_bytes'] / 1e9:.2f} GB whole, "
            f"{row['low_rank_bytes'] / 1e9:.2f} GB low-rank, ratio {row['ratio']:.3f}"
        )
        for name, times in row["exchange_s"].items():
            print(f"    {name:12}{times['whole']:9.2f} s whole {times['low_rank']:9.2f} s low-rank")


if __name__ == "__main__":
    run_from_command_line(main)
