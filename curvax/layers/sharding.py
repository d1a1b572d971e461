"""Kronecker factors and their inverses over the devices of a mesh, where they are too large for each."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from curvax.types import PyTree


def factor_shardings(state: PyTree, mesh: Mesh, axis_name: str) -> PyTree:
    r"""Shardings of a state that split its stacks of matrices over an axis of a mesh, and copy the rest.

    An array (blocks, rows, columns), such as a factor or the inverse of one, is split by its blocks, the
    layers of a scan or the experts of a mixture, where the devices share them out evenly, else by its rows, where they
    share those; all else is on every device. Results are those of one device; each matrix is put together where it is
    worked with. The one behind the inputs for a bias makes a side odd: ``find_layers(..., bias="separate")`` leaves
    sides as they are.

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

    def sharding(leaf):
        spec = PartitionSpec()
        if leaf.ndim == 3 and leaf.shape[0] % devices == 0:
            spec = PartitionSpec(axis_name, None, None)
        elif leaf.ndim == 3 and leaf.shape[1] % devices == 0:
            spec = PartitionSpec(None, axis_name, None)
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, state)
