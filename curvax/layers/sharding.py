"""Kronecker factors and their inverses over the devices of a mesh, where they are too large for each."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from curvax.layers.factors import KroneckerFactors
from curvax.layers.tridiagonal import Link
from curvax.types import PyTree


def factor_shardings(state: PyTree, mesh: Mesh, axis_name: str) -> PyTree:
    r"""Shardings of a state that split its factors and inverses over an axis of a mesh, and copy the rest.

    An array (blocks, rows, columns), such as a factor or the inverse of one, is split by its blocks, the layers of a
    scan or the experts of a mixture, where the devices share them out evenly, else by its rows, where they share those;
    what ties two blocks of a block-tridiagonal inverse by its rows. All else is on every device, but for what has three
    axes elsewhere in the state, such as the last change of weights under a scan. Results are those of one device; each
    matrix is put together where it is worked with, so that it is memory that is shared out. The one behind the inputs
    for a bias makes a side odd: ``find_layers(..., bias="separate")`` leaves sides as they are.

    Args:
        state: A state, or its shapes: ``jax.eval_shape(tx.init, params)``.
        axis_name: The axis of the mesh, such as that of the batch.

    Returns:
        A pytree of ``NamedSharding`` like ``state``, for ``jax.device_put`` and the ``out_shardings`` of ``jax.jit``.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> shardings = curvax.layers.factor_shardings({"A": jnp.zeros((4, 3, 3))}, mesh, "data")
        >>> tuple(shardings["A"].spec)
        ('data', None, None)
    """
    devices = mesh.shape[axis_name]

    def split(leaf, *axes):
        """By the first of the axes that the devices share out evenly."""
        axis = next((i for i in axes if leaf.shape[i] % devices == 0), None)
        names = () if axis is None else tuple(axis_name if i == axis else None for i in range(leaf.ndim))
        return NamedSharding(mesh, PartitionSpec(*names))

    def stack(leaf):
        return split(leaf, 0, 1) if leaf.ndim == 3 else split(leaf)

    def matrix(leaf):
        return split(leaf, 0) if leaf.ndim == 2 else split(leaf)

    def of(node):
        if isinstance(node, Link):
            return jax.tree.map(matrix, node)
        if isinstance(node, KroneckerFactors):
            cross = (jax.tree.map(matrix, side) for side in (node.cross_inputs, node.cross_outputs))
            return KroneckerFactors(*jax.tree.map(stack, node[:3]), *cross)
        return stack(node)

    return jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, (Link, KroneckerFactors)))
