"""Weights that are trained, and weights that are not."""

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[Any, Any]


def partition(weights: Tree) -> tuple[Tree, Tree]:
    """Nested weights as (trained, frozen): the base of every LoRA is frozen.

    Without LoRA nothing is frozen, and the second is empty.
    """
    flat = flatten_dict(weights)
    frozen = {path: leaf for path, leaf in flat.items() if "base" in path}
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return unflatten_dict(trained), unflatten_dict(frozen)


def union(trained: Tree, frozen: Tree) -> Tree:
    """All weights: the inverse of :func:`partition`."""
    if not frozen:
        return trained
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)})
