"""Which parameters are projected."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class KeyPath(tuple):
    """A JAX key path (a tuple of keys) that also reads as text.

    ``str(path)`` is ``"layers/0/attention/q"``, and ``"attention" in path`` looks for that text,
    because this is what a rule about names wants to ask.
    """

    def __str__(self) -> str:
        return jax.tree_util.keystr(tuple(self), simple=True, separator="/") or "(root)"

    def __contains__(self, item: object) -> bool:
        return item in str(self) if isinstance(item, str) else super().__contains__(item)


def shape_and_dtype(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    """Of a parameter: an array, the shape of one, or a Python number."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    if isinstance(leaf, (bool, int, float, complex)):
        return jax.ShapeDtypeStruct((), jnp.result_type(leaf))
    raise TypeError(
        f"{KeyPath(path)}: parameters must be arrays, got {leaf!r} of type {type(leaf).__name__}. "
        "Give init and update the arrays of a model alone: of an Equinox model "
        "eqx.filter(model, eqx.is_inexact_array), of a Flax NNX model nnx.state(model, nnx.Param)"
    )


# Parts of a name that mark a table of tokens or the output head in the model libraries of JAX
# and in checkpoints converted from PyTorch.
_EXCLUDED_NAMES = frozenset(
    {"lm_head", "head", "output_head", "classifier", "logits", "wte", "wpe", "vocab"}
)
# Vectors, which stacked layers turn into something of the shape of a matrix.
_VECTOR_NAMES = frozenset({"scale", "bias"})

Where = Callable[[Any, Any], bool] | Any


def hidden_matrices(path: Any, leaf: Any = None) -> bool:
    """The default rule for ``where``: the weight matrices inside a network.

    True for floating-point parameters of at least two axes, unless a part of the path names an
    embedding or the output head (contains ``embed`` or is one of ``lm_head``, ``head``,
    ``output_head``, ``classifier``, ``logits``, ``wte``, ``wpe``, ``vocab``) or the vectors of
    stacked layers (contains ``norm`` or is ``scale`` or ``bias``). Used as ``where``, it also
    leaves out every matrix with a side that is not larger than the rank: nothing would be saved.

    Args:
      path: the key path of the parameter.
      leaf: the parameter, anything with a shape and a dtype.

    Returns:
      Whether the parameter is projected.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> ng.hidden_matrices(("mlp", "kernel"), jnp.zeros((8, 4)))
      True
      >>> ng.hidden_matrices(("embed", "embedding"), jnp.zeros((8, 4)))
      False
    """
    if leaf is None:
        raise TypeError(
            "hidden_matrices needs a path and a parameter. If optax.inject_hyperparams called it "
            "as a schedule, pass static_args=natgalore_jax.structural_args(factory)"
        )
    names = [
        jax.tree_util.keystr((k,), simple=True) if not isinstance(k, str) else k
        for k in tuple(path)
    ]
    named_otherwise = any(
        "embed" in name or "norm" in name or name in _EXCLUDED_NAMES | _VECTOR_NAMES
        for name in map(str.lower, names)
    )
    leaf = shape_and_dtype(tuple(path), leaf)
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and not named_otherwise


def selected(where: Where, tree: Any) -> list[bool]:
    """``where`` in any of its forms, as one boolean per leaf of ``tree``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in leaves:
        shape_and_dtype(path, leaf)  # for its error, before where is asked
    if callable(where):
        return [bool(where(KeyPath(path), leaf)) for path, leaf in leaves]
    flags = entry_per_leaf("where", where, tree)
    for flag in flags:
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"where must be True or False at every parameter, got {flag!r}")
    return [bool(flag) for flag in flags]


def entry_per_leaf(
    name: str, prefix: Any, tree: Any, is_entry: Callable[[Any], bool] | None = None
) -> list[Any]:
    """An argument that is a prefix of the tree of parameters, as one entry per leaf of ``tree``.

    Where ``tree`` has nothing (None, or the ``MaskedNode`` of ``optax.masked`` and
    ``optax.partition``) the prefix may have anything, an entry for what was left out.

    Args:
      name: of the argument.
      prefix, tree: see above.
      is_entry: of a node of the prefix that is an entry, such as None.
    """

    def entries(prefix, tree, path):
        if not jax.tree.leaves(tree):
            return []
        if (is_entry is not None and is_entry(prefix)) or jax.tree_util.all_leaves([prefix]):
            return [prefix] * len(jax.tree.leaves(tree))
        (wanted, wanted_kind), (given, given_kind) = map(_one_level, (tree, prefix))
        if given_kind != wanted_kind:
            raise ValueError(
                f"{name} is no prefix of the tree of parameters: {KeyPath(path)} is {wanted_kind} "
                f"there, but received {given_kind}"
            )
        return [
            entry
            for (key, child), (_, own) in zip(wanted, given, strict=True)
            for entry in entries(own, child, (*path, *key))
        ]

    return entries(prefix, tree, ())


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """The children of a node with their keys, and what kind of node it is."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
