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
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and not named_otherwise


def selected(where: Where, tree: Any) -> list[bool]:
    """``where`` in any of its forms, as one boolean per leaf of ``tree``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        return []
    if callable(where):
        return [bool(where(KeyPath(path), leaf)) for path, leaf in leaves]
    flags = jax.tree.leaves(broadcast_prefix("where", where, tree))
    for flag in flags:
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"where must be True or False at every parameter, got {flag!r}")
    return [bool(flag) for flag in flags]


def broadcast_prefix(name: str, prefix: Any, tree: Any, is_leaf: Any = None) -> Any:
    """An argument that is a prefix of the tree of parameters, as a whole tree."""
    try:
        return jax.tree.broadcast(prefix, tree, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(f"{name} is no prefix of the tree of parameters: {error}") from error
