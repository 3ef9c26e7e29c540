"""Selection of the parameters that are projected."""

import itertools
import re
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


class KeyPath(tuple):
    """A JAX key path (a tuple of keys) that also reads as text.

    ``str(path)`` is ``"layers/0/attention/q"``, and ``"attention" in path`` searches that text.
    """

    def __str__(self) -> str:
        return jax.tree_util.keystr(tuple(self), simple=True, separator="/") or "(root)"

    def __contains__(self, item: object) -> bool:
        return item in str(self) if isinstance(item, str) else super().__contains__(item)


def shape_and_dtype(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a parameter: an array, a ``ShapeDtypeStruct`` or a Python number."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    if isinstance(leaf, (bool, int, float, complex)):
        return jax.ShapeDtypeStruct((), jnp.result_type(leaf))
    raise TypeError(
        f"{KeyPath(path)}: parameters must be arrays, got {leaf!r} of type {type(leaf).__name__}. "
        "Give init and update the arrays of a model alone: of an Equinox model "
        "eqx.filter(model, eqx.is_inexact_array), of a Flax NNX model nnx.state(model, nnx.Param)"
    )


# Rules for one part of a name, from the model libraries of JAX and from checkpoints converted from
# PyTorch. "emb" and "ln" match whole words only, because many other names contain them.
_EMBEDDING = re.compile(r"embed|(^|_)emb$|^(wte|wpe|vocab)$|^rel.*(pos|bias)")
_HEAD = re.compile(
    r"^(head|classifier|logits|logits_dense|to_logits|qa_outputs|vocab_projector"
    r"|seq_relationship)$|(?<!multi)_head$"
)
_ROUTER = re.compile(r"router|^shared_expert_gate$")
# Vectors, which have the shape of a matrix in stacked layers.
_VECTOR = re.compile(r"norm|(^|_)(ln|rms)(_|\d|$)|^(scale|bias|offset|gamma|beta)$")
# Names of an embedding or a head at this position only.
_SHARED, _DECODER = ("shared", "weight"), ("predictions", "decoder")
_AT_THE_ROOT = frozenset({"output", "proj_out", "score"})
_WRAPPERS = frozenset({"params", "model", "module", "target"})

Where = Callable[[Any, Any], bool] | Any


def hidden_matrices(path: Any, leaf: Any = None) -> bool:
    """The default rule for ``where``: the weight matrices inside a network.

    True for floating-point parameters of at least two axes, except for the names below. The parts
    of a name are the keys of the path, each split at ``.`` and ``/`` (``transformer.wte.weight``,
    ``vit/~/head``), and the elements of keys that are tuples. A parameter is left out if a part of
    its name, in lower case, marks

    * a table of tokens or positions: contains ``embed``, is ``emb``, ``wte``, ``wpe`` or ``vocab``,
      ends with ``_emb``, starts with ``rel`` and contains ``pos`` or ``bias``; ``shared.weight``;
    * the output head: is ``head``, ``classifier``, ``logits``, ``logits_dense``, ``to_logits``,
      ``qa_outputs``, ``vocab_projector`` or ``seq_relationship``, or ends with ``_head`` (not
      ``multi_head``); ``predictions.decoder``; ``output``, ``proj_out`` or ``score`` at the root;
    * a router of experts: contains ``router``, or is ``shared_expert_gate``; ``gate`` (not of
      experts) below a part that contains ``moe``, or with one side less than an eighth of the
      other side. The experts themselves are projected;
    * the vectors of stacked layers: contains ``norm`` or the word ``ln`` or ``rms``, is ``scale``,
      ``bias``, ``offset``, ``gamma`` or ``beta``, or is the last part and ends with ``_bias`` or
      ``_scale``; not if the last part ends with ``kernel``.

    As ``where`` it also leaves out matrices with a side no larger than the rank, because projection
    would save nothing.

    Args:
      path: the key path of the parameter, or its name.
      leaf: the parameter, anything with a shape and a dtype.

    Returns:
      Whether the parameter is projected.

    Raises:
      TypeError: without a leaf, and for one that is no array.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> ng.hidden_matrices(("mlp", "kernel"), jnp.zeros((8, 4)))
      True
      >>> ng.hidden_matrices(("embed", "embedding"), jnp.zeros((8, 4)))
      False
      >>> ng.hidden_matrices(("model.lm_head.weight",), jnp.zeros((8, 4)))
      False
    """
    if leaf is None:
        raise TypeError(
            "hidden_matrices needs a path and a parameter. If optax.inject_hyperparams called it "
            "as a schedule, pass static_args=natgalore_jax.structural_args(factory)"
        )
    return _is_matrix(path, leaf) and not _is_named_otherwise(_parts(path), leaf.shape)


def all_matrices(path: Any, leaf: Any) -> bool:
    """Embeddings, output heads and hidden matrices, without stacked vectors."""
    parts = _parts(path)
    is_embedding = any(_EMBEDDING.search(part) for part in parts)
    return _is_matrix(path, leaf) and (is_embedding or not _is_named_a_vector(parts))


def token_matrices(path: Any, leaf: Any) -> bool:
    """Embeddings and output heads by the rules of :func:`hidden_matrices`."""
    parts = _parts(path)
    is_for_tokens = _is_named_an_embedding(parts) or _is_named_a_head(parts)
    return all_matrices(path, leaf) and is_for_tokens


def output_heads(path: Any, leaf: Any) -> bool:
    """Matrices whose name marks an output head by the rules of :func:`hidden_matrices`."""
    return all_matrices(path, leaf) and _is_named_a_head(_parts(path))


def is_stacked_vector(path: Any, leaf: Any) -> bool:
    """Vectors of stacked layers, by the rules of :func:`hidden_matrices`."""
    return _is_matrix(path, leaf) and _is_named_a_vector(_parts(path))


def _is_matrix(path: Any, leaf: Any) -> bool:
    kind = shape_and_dtype(path, leaf)
    return len(kind.shape) > 1 and jnp.issubdtype(kind.dtype, jnp.floating)


def _parts(key: Any) -> list[str]:
    """The parts of a key path, a key or a name, in lower case."""
    if isinstance(key, (tuple, list)):
        return [part for inner in key for part in _parts(inner)]
    for field in ("key", "name", "idx"):  # of JAX's key types; a dict's key may be a tuple
        if hasattr(key, field):
            return _parts(getattr(key, field))
    return [part for part in re.split(r"[./]", str(key).lower()) if part]


def _is_named_a_vector(parts: list[str]) -> bool:
    # The last part is "value" where a box of Flax is around the parameter.
    last = next((part for part in reversed(parts) if part != "value"), "")
    if last.endswith("kernel"):  # of a layer inside a module with a norm: LayerNormMLP/wi_kernel
        return False
    return any(_VECTOR.search(part) for part in parts) or last.endswith(("_bias", "_scale"))


def _is_named_an_embedding(parts: list[str]) -> bool:
    return any(_EMBEDDING.search(part) for part in parts) or _SHARED in itertools.pairwise(parts)


def _is_named_a_head(parts: list[str]) -> bool:
    if any(_HEAD.search(part) for part in parts) or _DECODER in itertools.pairwise(parts):
        return True
    return next((part for part in parts if part not in _WRAPPERS), "") in _AT_THE_ROOT


def _is_named_otherwise(parts: list[str], shape: tuple[int, ...]) -> bool:
    if _is_named_an_embedding(parts) or any(_ROUTER.search(part) for part in parts):
        return True
    if _is_named_a_head(parts) or _is_named_a_vector(parts):
        return True
    if "gate" not in parts or any("expert" in part for part in parts):
        return False
    # "gate" is also a matrix of gated MLPs, whose sides are of similar size.
    small, large = sorted(shape[-2:])
    return any("moe" in part for part in parts) or 8 * small < large


def _unboxed(path: Any) -> Any:
    """The path without the attribute of a box of Flax.

    Of an ``nnx.State``, which ``nnx.Optimizer`` gives to init and not to update, and of Linen's
    ``Partitioned``. Rules for names must decide alike for both.
    """
    keys = jax.tree_util
    boxed = path[-1:] == (keys.GetAttrKey("value"),) and isinstance(path[-2:][0], keys.DictKey)
    return path[:-1] if boxed else path


def is_function(x: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether x is a function and not a tree: modules of Equinox are trees that can be called."""
    return callable(x) and jax.tree_util.all_leaves([x])


def selected(where: Where, tree: Any, name: str = "where") -> list[bool]:
    """One boolean per leaf of ``tree`` from any form of ``where``; errors begin with ``name``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in leaves:
        shape_and_dtype(path, leaf)  # for its error, before where is called
    if is_function(where):
        return [bool(where(KeyPath(_unboxed(path)), leaf)) for path, leaf in leaves]
    flags = entry_per_leaf(name, where, tree)
    for flag in flags:
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False at every parameter, got {flag!r}")
    return [bool(flag) for flag in flags]


def entry_per_leaf(
    name: str, prefix: Any, tree: Any, is_entry: Callable[[Any], bool] | None = None
) -> list[Any]:
    """One entry per leaf of ``tree`` from a prefix of the tree of parameters.

    Where ``tree`` has no leaves (None, or the ``MaskedNode`` of ``optax.masked`` and
    ``optax.partition``), any entry of the prefix is accepted and ignored.

    Args:
      name: of the argument, for errors.
      prefix: the argument.
      tree: the parameters.
      is_entry: whether a node of the prefix is an entry although it is not a leaf, such as None.
    """

    def entries(prefix, tree, path):
        if not jax.tree.leaves(tree):
            return []
        if (is_entry is not None and is_entry(prefix)) or jax.tree_util.all_leaves([prefix]):
            return [prefix] * len(jax.tree.leaves(tree))
        (expected, expected_kind), (received, received_kind) = map(one_level, (tree, prefix))
        if received_kind != expected_kind:
            raise ValueError(
                f"{name} is not a prefix of the tree of parameters: {KeyPath(path)} is "
                f"{expected_kind}, but received {received_kind}"
            )
        return [
            entry
            for (key, child), (_, own) in zip(expected, received, strict=True)
            for entry in entries(own, child, (*path, *key))
        ]

    return entries(prefix, tree, ())


def one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """The children of a node with their keys, and the type of the node."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
