"""Shardings of parameters, and of an optimizer's state from the shardings of the parameters."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from natgalore_jax._src.params.axes import DEFAULT, AxesLike, axes_per_leaf
from natgalore_jax._src.params.checks import check_transformation
from natgalore_jax._src.params.plan import matrix_modes
from natgalore_jax._src.params.where import KeyPath, is_stacked_vector
from natgalore_jax._src.training.offload import host_kind


def longer_side_shardings(
    params: Any,
    mesh: Mesh | AbstractMesh,
    axis_name: str | Sequence[str] | None = None,
    axes: AxesLike = None,
) -> Any:
    """Shard each matrix along its longer side: the layout in which the optimizer sends least.

    The longer side is also a side of the low-rank gradient, so that a step gathers bases alone
    (docs/sharding.md has the communication of each layout). Pass the result to
    :func:`state_shardings` for the state. Stacked layers stay together on every device.

    Args:
      params: the parameters: arrays or ``jax.ShapeDtypeStruct``.
      mesh: a ``jax.sharding.Mesh`` or ``jax.sharding.AbstractMesh``.
      axis_name: the mesh axis to shard over, or several that are used as one; None: all axes of
        the mesh.
      axes: the axes of each matrix, as for :func:`.low_rank_project`. A side of several axes is
        sharded along the first of them that the devices divide.

    Returns:
      A ``jax.sharding.NamedSharding`` for each parameter. Square matrices are sharded along their
      columns, matrices of which the devices divide only the shorter side along that side; vectors
      (of stacked layers too, by their names: :func:`.hidden_matrices`), and matrices of which they
      divide no side, are replicated.

    Raises:
      ValueError: for an axis that the mesh does not have, and for ``axes`` that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> mesh = jax.sharding.AbstractMesh((4,), ("data",))
      >>> params = {"up": jnp.ones((6, 8)), "down": jnp.ones((8, 6)), "bias": jnp.ones(8)}
      >>> shardings = ng.training.longer_side_shardings(params, mesh)
      >>> {name: sharding.spec for name, sharding in shardings.items()}
      {'bias': P(), 'down': P('data',), 'up': P(None, 'data')}
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or mesh.axis_names)
    if unknown := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(
            f"axis_name must be axes of the mesh, {', '.join(mesh.axis_names)}, got {unknown}"
        )
    devices = math.prod(mesh.shape[name] for name in names)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)

    def spec(path: Any, x: Any, axes: Any) -> PartitionSpec:
        shape = tuple(x.shape)
        is_matrix = axes not in (None, DEFAULT) or not is_stacked_vector(path, x)
        if len(shape) < 2 or not is_matrix:
            return PartitionSpec()
        _, (rows, columns) = matrix_modes(KeyPath(path), shape, axes or DEFAULT)
        longer_first = sorted(
            (columns, rows), key=lambda side: math.prod(shape[a] for a in side), reverse=True
        )
        for axis in sum(longer_first, ()):
            if shape[axis] % devices == 0:
                return PartitionSpec(*[None] * axis, names if len(names) > 1 else names[0])
        return PartitionSpec()

    return treedef.unflatten(
        NamedSharding(mesh, spec(path, x, leaf_axes))
        for (path, x), leaf_axes in zip(leaves, axes_per_leaf(axes, params), strict=True)
    )


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any = None) -> Any:
    r"""The shardings of ``tx.init(params)``, from shapes alone: for ``jax.jit`` and for Orbax.

    Each array follows its parameter. A stack of matrices with the spec ``(l, a, b)``, of layers,
    rows and columns, has, if its rows are projected,

    =============================================== ================================
    basis P, ``(L, m, r)``                          ``(l, a, None)``
    moments and other arrays like R, ``(L, r, n)``  ``(l, None, b)``
    a stored history, ``(L, s, r, n)``              ``(l, None, None, b)``
    Fisher entries, ``(L, r)`` and ``(L, n)``       ``(l, None)`` and ``(l, b)``
    =============================================== ================================

    and correspondingly for the other sides. Large arrays are not replicated over the freed mesh
    axes, b of P and a of R: these shard another axis, first m or n, then L, whose length they
    divide, ``(l, (a, b), None)`` and ``(l, None, (b, a))``. If b is an axis, every step gathers P
    (m × r numbers for each matrix). Numbers that all parameters share are replicated.
    (:func:`.ldadamw`, :func:`.apollo_adamw` and :func:`.alice_adamw` replicate over freed mesh
    axes.)

    On a mesh with explicit axes, the default of ``jax.make_mesh``, ``jax.jit(tx.init)`` has these
    shardings by itself, and an update preserves the shardings of the state.

    Args:
      tx: any Optax transformation.
      params: the parameters: arrays or ``jax.ShapeDtypeStruct``.
      shardings: a ``jax.sharding.NamedSharding`` for each parameter, or one for all, such as
        those of :func:`longer_side_shardings`; None: the shardings of ``params``. One
        ``jax.sharding.SingleDeviceSharding`` for all parameters is accepted too.

    Returns:
      A ``NamedSharding`` for each array of the state, in the structure of the state, or a
      ``SingleDeviceSharding`` like that of the parameters. Arrays that :func:`offload_state` keeps
      in host memory have its memory kind.

    Raises:
      ValueError: for a parameter without one of these, and for several meshes or devices. Other
        kinds of shardings do not name the mesh axis of each side.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> columns = jax.NamedSharding(mesh, jax.P(None, "model"))
      >>> tx = ng.galore_adamw(1e-2, rank=2)
      >>> params = {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32, sharding=columns)}
      >>> shardings = ng.training.state_shardings(tx, params)
      >>> optax.tree.get(shardings, "mu")["w"].spec
      P(None, 'model')
      >>> init = jax.jit(tx.init, out_shardings=shardings)
    """
    given, mesh = _placement(params, shardings)
    if isinstance(mesh, SingleDeviceSharding):
        return jax.tree.map(
            lambda x: SingleDeviceSharding(*mesh.device_set, memory_kind=host_kind(x)),
            _state_types(tx, params),
        )
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def abstract(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(explicit, sharding.spec)
        )

    with jax.sharding.use_abstract_mesh(explicit):
        state = _state_types(tx, jax.tree.map(abstract, params, given))
    return jax.tree.map(
        lambda x: NamedSharding(mesh, x.sharding.spec, memory_kind=host_kind(x)), state
    )


def _state_types(tx: optax.GradientTransformation, params: Any) -> Any:
    """The state's types, which unlike the results of jax.eval_shape have a memory space."""
    traced = jax.jit(tx.init).trace(params)
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), traced.jaxpr.out_avals)


def with_shardings(
    tx: optax.GradientTransformation, params: Any, shardings: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on explicit axes, for parameters on a mesh with automatic axes.

    On explicit axes the type of a gradient has its sharding, and the refresh of bases is sharded
    too: stacked layers on different devices are refreshed where they are. On automatic axes XLA
    decides alone, which works well for sharded rows and columns, but gathers a stack with sharded
    layers. Numbers and state are unchanged. Callables among the extra arguments of ``update``, such
    as ``value_fn``, compute on automatic axes, and their results are replicated.

    Args:
      tx: an Optax transformation that supports explicit axes, as all of this library do.
      params, shardings: see :func:`.state_shardings`.

    Returns:
      A transformation for these parameters on this mesh; ``tx`` itself if its axes are explicit,
      and for one device. Pass ``tx``, and not this transformation, to :func:`.low_rank_steps` and
      :func:`.per_layer`.

    Raises:
      ValueError: see :func:`.state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> mesh = jax.make_mesh((1,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> by_layer = jax.NamedSharding(mesh, jax.P("layers"))
      >>> params = {"w": jax.device_put(jnp.ones((4, 6, 8)), by_layer)}
      >>> tx = ng.training.with_shardings(ng.galore_adamw(1e-2, rank=2), params)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> updates["w"].shape
      (4, 6, 8)
    """
    check_transformation("tx", tx)
    given, mesh = _placement(params, shardings)
    tx = optax.with_extra_args_support(tx)
    if isinstance(mesh, SingleDeviceSharding):
        return tx
    if all(kind == AxisType.Explicit for kind in mesh.axis_types):
        return tx
    of_state = state_shardings(tx, params, shardings)
    specs, state_specs = (jax.tree.map(lambda s: s.spec, x) for x in (given, of_state))

    @jax.jit
    def sharded_init(params):
        return jax.lax.with_sharding_constraint(tx.init(params), of_state)

    def init_fn(params):
        if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
            return tx.init(params)  # of shapes, or of placeholders of optax.tree.map_params
        return sharded_init(params)

    # explicit_axes is for use within jit.
    @partial(jax.jit, static_argnames=("others", "extra_tree"))
    def explicit_update(updates, state, params, arrays, others, extra_tree):
        def update(updates, state, params, arrays):
            pairs = zip(arrays, others, strict=True)
            extra = [_on_automatic_axes(x) if a is None else a for a, x in pairs]
            return tx.update(updates, state, params, **extra_tree.unflatten(extra))

        everywhere = [None if a is None else PartitionSpec() for a in arrays]
        in_sharding = (specs, state_specs, None if params is None else specs, everywhere)
        with jax.sharding.use_abstract_mesh(
            mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
        ):
            explicit: Any = jax.sharding.explicit_axes(update, in_sharding=in_sharding)
            return explicit(updates, state, params, arrays)

    def update_fn(updates, state, params=None, **extra_args):
        # A callable, as of a line search, or a name is no operand of a compiled function.
        leaves, treedef = jax.tree.flatten(extra_args)
        arrays = [x if _is_operand(x) else None for x in leaves]
        others = tuple(None if _is_operand(x) else x for x in leaves)
        return explicit_update(updates, state, params, arrays, others, treedef)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _on_automatic_axes(x: Any) -> Any:
    """Let a callable, such as a loss, compute on the axes that the program around has."""
    if not callable(x):
        return x

    def replicated(*args, **kwargs):
        of_trees: Any = jax.sharding.auto_axes(
            lambda args, kwargs: x(*args, **kwargs), out_sharding=PartitionSpec()
        )
        return of_trees(args, kwargs)

    return replicated


def _is_operand(x: Any) -> bool:
    return hasattr(x, "dtype") or isinstance(x, (bool, int, float, complex))


# Of a parameter without one: a leaf, as None would be no parameter (a bias that is left out).
_NO_SHARDING = "None"


def _placement(
    params: Any, shardings: Any
) -> tuple[Any, Mesh | AbstractMesh | SingleDeviceSharding]:
    """One sharding for each parameter, and the mesh or the one device of all."""
    given = _shardings(params, shardings)
    # Without parameters the sharding that is given for all has the mesh.
    known = given if jax.tree.leaves(given) else shardings
    return given, _single_device(known) or _mesh(known)


def _shardings(params: Any, shardings: Any) -> Any:
    """One sharding for each parameter."""
    if shardings is None:
        return jax.tree.map(lambda x: getattr(x, "sharding", None) or _NO_SHARDING, params)
    is_sharding = lambda x: isinstance(x, jax.sharding.Sharding)  # noqa: E731
    return jax.tree.map(
        lambda s, part: jax.tree.map(lambda _: s, part), shardings, params, is_leaf=is_sharding
    )


def _single_device(shardings: Any) -> SingleDeviceSharding | None:
    """The device of all parameters, if they are on one device without a mesh."""
    found = set(jax.tree.leaves(shardings))
    only = found.pop() if len(found) == 1 else None
    return only if isinstance(only, SingleDeviceSharding) else None


def _mesh(shardings: Any) -> Mesh | AbstractMesh:
    meshes = set()
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"state_shardings needs a jax.sharding.NamedSharding for every parameter, got "
                f"{sharding} for {KeyPath(path)}: put the parameters on a mesh, or give shardings"
            )
        meshes.add(sharding.mesh)
    if len(meshes) != 1:
        raise ValueError(f"state_shardings needs parameters on one mesh, got {len(meshes)} meshes")
    return meshes.pop()
