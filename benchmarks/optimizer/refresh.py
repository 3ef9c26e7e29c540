"""What a refresh of a basis costs, what it captures, and the memory that it takes.

``python -m benchmarks.optimizer.refresh`` measures (a) the time of a warm power refresh beside a
randomised SVD, Gram matrix and eigenvectors, the exact SVD, and the same power steps by
factorisations; (b) the energy ‖PᵀG‖² that warm refreshes capture of the gradients of a model in
training, relative to the exact SVD's; (c) what the refresh adds to the temporary memory of the
compiled update of a stack of layers.
"""

from pathlib import Path
from typing import Any

import tyro

from benchmarks.common.environment import RESULTS, environment, print_targets, target, write
from benchmarks.optimizer.basis_energy import basis_energy
from benchmarks.optimizer.basis_time import basis_time
from benchmarks.optimizer.update_memory import update_memory
from examples.llama.data import DataConfig


def main(
    shape: tuple[int, int] = (1024, 2736),
    rank: int = 128,
    rounds: int = 8,
    preset: str = "nano",
    layers: int | None = None,
    steps: int = 200,
    intervals: tuple[int, ...] = (50, 200),
    batch: int | None = None,
    stack: tuple[int, int, int] = (8, 512, 1376),
    history: int = 0,
    seed: int = 0,
    data: tyro.conf.Suppress[DataConfig | None] = None,
    output: Path = RESULTS / "refresh.json",
) -> dict[str, Any]:
    """Measure time, energy and memory of a refresh.

    Args:
      shape: of the matrix that is timed.
      rank: of its subspace, and of the stack's.
      rounds: how often each method is timed, the first not counted.
      preset: the model that is trained, at its own rank.
      layers: as many of its layers; by default all.
      steps: of training; at the longest interval or above, every matrix has a warm refresh.
      intervals: steps between two refreshes of a matrix.
      batch: rows in a batch; by default the preset's.
      stack: (layers, m, n) of the leaf whose update is compiled.
      history: gradients kept for the natural gradient, in that update; 0: its compact form.
      seed: of parameters, gradients and data.
      data: the text; by default the preset's.
      output: where the results go.
    """
    where_and_how = environment(seed)
    time = basis_time(shape, rank, rounds, seed)
    energy = basis_energy(preset, layers, steps, intervals, seed, data, batch)
    memory = update_memory(stack, rank, history)
    results = {
        "environment": where_and_how,
        "time": time,
        "energy": energy,
        "memory": memory,
        "targets": [
            target("warm refresh, time / exact SVD", time["to_svd"]["power"], 0.1),
            target(
                "warm refresh, time / the same by factorisations",
                time["median_s"]["power"] / time["median_s"]["power by factorisations"],
                1.0,
            ),
            target(
                "largest entry of PᵀP − I",
                max(row["orthonormality"] for row in energy["refreshes"]),
                1e-5,
            ),
            *(
                target(
                    f"energy / exact SVD, smallest, interval {T}", row["all"]["min"], 0.995, False
                )
                for T, row in energy["warm"].items()
            ),
            *(
                target(f"{name}, memory / one layer's refresh", row["refresh_to_one_layer"], 1.0)
                for name, row in memory["optimizers"].items()
            ),
        ],
    }
    _print(results)
    write(results, output)
    return results


def _print(results: dict[str, Any]) -> None:
    time, energy, memory = (results[key] for key in ("time", "energy", "memory"))
    print(f"(a) a new basis of {time['shape']} at rank {time['rank']}")
    for method, median in time["median_s"].items():
        print(
            f"  {method:24}{1e3 * median:8.1f} ms   / SVD {time['to_svd'][method]:6.3f}   "
            f"energy / SVD {time['energy_to_svd'][method]:.4f}"
        )
    print(
        f"\n(b) energy / SVD on gradients of {energy['preset']} at rank {energy['rank']}, "
        f"{energy['steps']} steps, last loss {energy['last_loss']:.2f}"
    )
    print(f"  {'interval':>8} {'matrix':8}{'number':>8}{'min':>10}{'mean':>10}{'stale min':>11}")
    for T, kinds in energy["warm"].items():
        for kind, row in kinds.items():
            stale = energy["stale"][T][kind]["min"]
            print(
                f"  {T:>8} {kind:8}{row['count']:8}{row['min']:10.5f}{row['mean']:10.5f}"
                f"{stale:11.5f}"
            )
    print(
        f"\n(c) temporary MiB of the update of {memory['shape']}; one layer's refresh alone "
        f"{memory['one_layer_refresh_bytes'] / 2**20:.2f}"
    )
    for name, row in memory["optimizers"].items():
        print(
            f"  {name:10}with refresh {row['with_refresh_bytes'] / 2**20:8.2f}   without "
            f"{row['without_refresh_bytes'] / 2**20:8.2f}"
        )
    print_targets(results["targets"])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
