"""Selection of the parameters that are projected."""

import itertools
import re
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


# Rules about one part of a name, from the model libraries of JAX and from checkpoints converted
# from PyTorch. "emb" and "ln" stand at the end of a word, or they would be in many other ones.
_EMBEDDING = re.compile(r"embed|(^|_)emb$|^(wte|wpe|vocab)$|^rel.*(pos|bias)")
_HEAD = re.compile(
    r"^(head|classifier|logits|logits_dense|to_logits|qa_outputs|vocab_projector"
    r"|seq_relationship)$|(?<!multi)_head$"
)
_ROUTER = re.compile(r"router|^shared_expert_gate$")
# Vectors, which stacked layers turn into something of the shape of a matrix.
_VECTOR = re.compile(r"norm|(^|_)ln(_|\d|$)|^(scale|bias|offset|gamma|beta)$")
# Names that mean an embedding or a head where they stand, and something else elsewhere.
_SHARED, _DECODER = ("shared", "weight"), ("predictions", "decoder")
_AT_THE_ROOT = frozenset({"output", "proj_out", "score"})
_WRAPPERS = frozenset({"params", "model", "module", "target"})

Where = Callable[[Any, Any], bool] | Any


def hidden_matrices(path: Any, leaf: Any = None) -> bool:
    """The default rule for ``where``: the weight matrices inside a network.

    True for floating-point parameters of at least two axes, unless their name says that they are
    something else. A name consists of the keys of the path, each split at ``.`` and ``/``
    (``transformer.wte.weight``, ``vit/~/head``), and of the elements of keys that are tuples.
    Left out are names with a part, in lower case, that marks

    * a table of tokens or positions: contains ``embed``, is ``emb``, ``wte``, ``wpe`` or ``vocab``,
      ends with ``_emb``, starts with ``rel`` and contains ``pos`` or ``bias``; ``shared.weight``;
    * the output head: is ``head``, ``classifier``, ``logits``, ``logits_dense``, ``to_logits``,
      ``qa_outputs``, ``vocab_projector`` or ``seq_relationship``, or ends with ``_head`` (not
      ``multi_head``); ``predictions.decoder``; ``output``, ``proj_out`` or ``score`` at the root;
    * a router of experts: contains ``router``, or is ``shared_expert_gate``; ``gate`` (not of
      experts) below a part that contains ``moe``, or with one side less than an eighth of the
      other one. The experts themselves are projected;
    * the vectors of stacked layers: contains ``norm`` or the word ``ln``, is ``scale``, ``bias``,
      ``offset``, ``gamma`` or ``beta``, or is the last part and ends with ``_bias``.

    Used as ``where``, it also leaves out every matrix with a side that is not larger than the rank:
    nothing would be saved.

    Args:
      path: the key path of the parameter, or its name.
      leaf: the parameter, anything with a shape and a dtype.

    Returns:
      Whether the parameter is projected.

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
    leaf = shape_and_dtype(tuple(path), leaf)
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return not _is_named_otherwise(_parts(path), leaf.shape)


def all_matrices(path: Any, leaf: Any) -> bool:
    """Embeddings, output heads and hidden matrices: no vectors, stacked ones included."""
    leaf, parts = shape_and_dtype(tuple(path), leaf), _parts(tuple(path))
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    is_embedding = any(_EMBEDDING.search(part) for part in parts)
    return is_embedding or not _is_named_a_vector(parts)


def output_heads(path: Any, leaf: Any) -> bool:
    """The matrices whose name marks an output head, as :func:`hidden_matrices` reads names."""
    return all_matrices(path, leaf) and _is_named_a_head(_parts(tuple(path)))


def _parts(key: Any) -> list[str]:
    """The parts of a key path, a key or a name, in lower case."""
    if isinstance(key, (tuple, list)):
        return [part for inner in key for part in _parts(inner)]
    for field in ("key", "name", "idx"):  # of JAX's kinds of keys; a dict's key may be a tuple
        if hasattr(key, field):
            return _parts(getattr(key, field))
    return [part for part in re.split(r"[./]", str(key).lower()) if part]


def _is_named_a_vector(parts: list[str]) -> bool:
    return any(_VECTOR.search(part) for part in parts) or "".join(parts[-1:]).endswith("_bias")


def _is_named_a_head(parts: list[str]) -> bool:
    if any(_HEAD.search(part) for part in parts) or _DECODER in itertools.pairwise(parts):
        return True
    return next((part for part in parts if part not in _WRAPPERS), "") in _AT_THE_ROOT


def _is_named_otherwise(parts: list[str], shape: tuple[int, ...]) -> bool:
    if any(rule.search(part) for rule in (_EMBEDDING, _ROUTER) for part in parts):
        return True
    if _SHARED in itertools.pairwise(parts):
        return True
    if _is_named_a_head(parts) or _is_named_a_vector(parts):
        return True
    if "gate" not in parts or any("expert" in part for part in parts):
        return False
    # Also the name of a matrix of gated MLPs, whose sides are of about the same size.
    small, large = sorted(shape[-2:])
    return any("moe" in part for part in parts) or 8 * small < large


def selected(where: Where, tree: Any, name: str = "where") -> list[bool]:
    """``where`` in any of its forms, as one boolean per leaf of ``tree``; errors say ``name``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in leaves:
        shape_and_dtype(path, leaf)  # for its error, before where is asked
    if callable(where):
        return [bool(where(KeyPath(path), leaf)) for path, leaf in leaves]
    flags = entry_per_leaf(name, where, tree)
    for flag in flags:
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False at every parameter, got {flag!r}")
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
