"""Energy of real gradients that a warm refresh captures, relative to an exact SVD of the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import natgalore_jax as ng
from examples.common.optimizers import make_optimizer
from examples.common.train_state import init_state
from examples.llama.data import DataConfig, load_splits, make_train_iterator
from examples.llama.run_config import run_preset
from examples.llama.training.train_step import make_model, make_train_step, token_nll


def basis_energy(
    preset: str,
    layers: int | None,
    steps: int,
    intervals: Sequence[int],
    seed: int,
    data: DataConfig | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Train a preset with its own optimizer and measure every refresh on the way.

    Beside the optimizer that trains, one projection per interval sees the same gradients; each
    keeps its bases up by its own staggered schedule. Whenever a basis has changed, the old and
    the new one are compared with NumPy's SVD, in float64, of the gradient of that step.

    Args:
      preset: the model, its rank and its text.
      layers: as many of its layers; None is all.
      steps: of training.
      intervals: steps between two refreshes of a matrix.
      seed: of parameters and data.
      data, batch: instead of the preset's.
    """
    config = run_preset(preset)
    splits = load_splits(data or config.data)
    config = dataclasses.replace(config, steps=steps, batch_size=batch or config.batch_size)
    config = config.with_vocabulary(splits.vocab_size)
    model = dataclasses.replace(config.model, layers=layers or config.model.layers)
    apply, params = make_model(model, seed)
    tx, _ = make_optimizer(config.optimizer, config.schedule, steps=steps, accumulate=1, seed=seed)
    train_step = make_train_step(apply, tx)
    trackers = {interval: _tracker(config.optimizer.rank, interval) for interval in intervals}

    @jax.jit
    def track(params, states, rows):
        grads = jax.grad(lambda p: token_nll(apply, p, rows).mean())(params)
        return grads, {T: trackers[T].update(grads, states[T])[1] for T in trackers}

    state = init_state(params, tx)
    tracked = {T: tracker.init(params) for T, tracker in trackers.items()}
    batches = make_train_iterator(
        splits.train, seed=seed, batch_size=config.batch_size, seq_len=config.seq_len
    )
    refreshes: list[dict[str, Any]] = []
    loss = float("nan")
    for step in range(steps):
        rows = next(batches)["tokens"]
        before = tracked
        grads, tracked = track(state.params, tracked, rows)
        for T in trackers:
            refreshes += [
                {"interval": T, "step": step, **row}
                for row in _changed(
                    grads, *(optax.tree.get(x[T], "basis") for x in (before, tracked))
                )
            ]
        state, metrics = train_step(state, rows)
        loss = float(metrics["loss"])
    warm = [row for row in refreshes if row["step"] > 0]
    return {
        "preset": preset,
        "rank": config.optimizer.rank,
        "optimizer": config.optimizer.name,
        "steps": steps,
        "last_loss": loss,
        "warm": _summary(warm, "after"),
        "stale": _summary(warm, "before"),
        "cold": _summary([row for row in refreshes if row["step"] == 0], "after"),
        "refreshes": refreshes,
    }


def _tracker(rank: int, interval: int):
    """The bases of the optimizer and nothing else of it."""
    return ng.chain(ng.low_rank_project(rank=rank, update_interval=interval), ng.project_back())


def _changed(grads, before, after) -> list[dict[str, Any]]:
    """One row for each matrix whose basis this step has changed."""
    rows = []
    of_path = {jax.tree_util.keystr(p): g for p, g in jax.tree_util.tree_leaves_with_path(grads)}
    for side in range(len(after)):
        old = jax.tree.leaves(before[side])
        for (path, P), P_old in zip(
            jax.tree_util.tree_leaves_with_path(after[side]), old, strict=True
        ):
            if np.array_equal(P, P_old):
                continue
            G = np.asarray(of_path[jax.tree_util.keystr(path)], np.float64)
            G = G.T if side == 1 else G
            best = np.sum(np.linalg.svd(G, compute_uv=False)[: P.shape[1]] ** 2)
            rows.append(
                {
                    "matrix": ".".join(str(key.key) for key in path),
                    "kind": str(path[-2].key),
                    "before": captured_energy(P_old, G) / best,
                    "after": captured_energy(P, G) / best,
                    "orthonormality": _loss_of_orthonormality(P),
                }
            )
    return rows


def _loss_of_orthonormality(P) -> float:
    P = np.asarray(P, np.float64)
    return float(np.max(np.abs(P.T @ P - np.eye(P.shape[1]))))


def captured_energy(P, G) -> float:
    """``‖PᵀG‖²`` in float64."""
    return float(np.sum(np.square(np.asarray(P, np.float64).T @ np.asarray(G, np.float64))))


def _summary(rows: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """By interval and kind of matrix, and over all of them: number, smallest and mean ratio."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of_interval = groups.setdefault(str(row["interval"]), {})
        for kind in (row["kind"], "all"):
            of_interval.setdefault(kind, []).append(row[which])
    return {
        T: {
            kind: {"count": len(v), "min": min(v), "mean": float(np.mean(v))}
            for kind, v in kinds.items()
        }
        for T, kinds in groups.items()
    }
