"""What one use of a layer gives: its inputs and output cotangents, and every product of the two that anyone needs.

Kinds of uses differ in how inputs are stored and products are formed; that stands here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.layers.geometry import Geometry
from curvax.types import Array, PyTree

if TYPE_CHECKING:
    from curvax.layers.find import Layer


class LayerUse(NamedTuple):
    """One use of a layer, with the examples kept apart; from ``TappedPoint.pull_back``.

    Attributes:
        inputs: a, of shape (blocks, examples, shared, inputs); of an embedding the indices, (1, examples, shared); of
            a scale its input, (1, examples, shared, features); of a shift None, standing for ones.
        cotangents: ds, of shape (blocks, examples, shared, outputs); from ``pull_back_columns`` with the columns in
            front.
        geometry: How the layer's matrices come from the parameters.
        kind: The kind of the use.
        swapped: Whether inputs and outputs are exchanged with respect to the layer's matrices.
    """

    inputs: Array | None
    cotangents: Array
    geometry: Geometry
    kind: str
    swapped: bool
    term: int
    layer: Layer

    # --- Kronecker factors ------------------------------------------------------------------------------------------

    def input_factor(self, weights: Array | None = None, *, homogeneous: bool = False, diagonal: bool = False) -> Array:
        """sum_n w_n sum_r a_r a_r^T, the factor on the inputs of the layer's matrices.

        Args:
            weights: w, a number for each example, or for each of its positions; ones if None.
            homogeneous: Append a one to every a, for the bias that rides on the layer.
            diagonal: Its diagonal alone, (blocks, inputs).

        Returns:
            The factor, (blocks, inputs, inputs); of an embedding its diagonal, (blocks, rows).

        Raises:
            ValueError: The layer is a scale or a shift, whose curvature has no Kronecker factors; or ``homogeneous`` is
                asked of an embedding or of weights tied to one.
        """
        return self._factor(self.swapped, weights, homogeneous, diagonal)

    def output_factor(self, weights: Array | None = None, *, diagonal: bool = False) -> Array:
        """sum_n w_n sum_r ds_r ds_r^T, the factor on the outputs of the layer's matrices; see ``input_factor``."""
        return self._factor(not self.swapped, weights, False, diagonal)

    def _factor(self, of_cotangents, weights, homogeneous, diagonal):
        if self.kind in ("scale", "shift"):
            raise ValueError(f"layer {self.layer.name!r} is a {self.kind}: its curvature has no Kronecker factors")
        if homogeneous and (self.swapped or self.kind == "embedding"):
            raise ValueError(f"layer {self.layer.name!r}: no bias rides on an embedding or on weights tied to one")
        if of_cotangents or self.kind != "embedding":
            rows = self.cotangents if of_cotangents else self.inputs
            assert rows is not None
            if homogeneous:
                rows = with_ones(rows)
            weighted = rows if weights is None else rows * _by_position(weights)[None, :, :, None].astype(rows.dtype)
            return sum_over_examples("bnri,bnri->bi" if diagonal else "bnri,bnrj->bij", weighted, rows)
        assert self.inputs is not None  # the indices: a one-hot input's second moment is diagonal and counts rows
        weights = jnp.ones(self.cotangents.shape[1], self.cotangents.dtype) if weights is None else weights
        counts = jnp.broadcast_to(_by_position(weights).astype(self.cotangents.dtype), self.inputs[0].shape)
        return self._added_to_rows(self._rows_read(), counts[..., None])[None, :, 0]

    # --- gradients --------------------------------------------------------------------------------------------------

    def gradient(self, weights: Array | None = None) -> Array:
        """sum_n w_n sum_r a_r ds_r^T in the layer's matrices, (blocks, inputs, outputs)."""
        cotangents = self.cotangents if weights is None else self.cotangents * weights[None, :, None, None]
        return self._summed(cotangents, per_example=False)

    def per_example(self) -> Array:
        """sum_r a_r ds_r^T for each example, (examples, blocks, inputs, outputs)."""
        return self._summed(self.cotangents, per_example=True)

    def squares(self, weights: Array) -> Array:
        """sum_n w_n sq(sum_r a_r ds_r^T) in the layer's matrices, (blocks, inputs, outputs)."""
        return self.products(self.cotangents, weights)

    def products(self, others: Array, weights: Array) -> Array:
        """sum_n w_n (sum_r a_r ds_r^T) * (sum_r a_r dt_r^T), elementwise, with dt from ``others``; like ``squares``."""
        if self.kind in ("dense", "conv") and self.cotangents.shape[2] == 1:
            assert self.inputs is not None
            inputs, cotangents = jnp.square(self.inputs[:, :, 0]), self.cotangents[:, :, 0] * others[:, :, 0]
            result = sum_over_examples("bni,bno->bio", inputs, cotangents * weights[None, :, None])
            return result.swapaxes(1, 2) if self.swapped else result
        if others is self.cotangents:
            return sum_in_chunks(
                lambda uses, w: jnp.einsum("n,nbio->bio", w, jnp.square(uses[0].per_example())), [self], weights
            )

        def product(uses, w):
            return jnp.einsum("n,nbio->bio", w, uses[0].per_example() * uses[1].per_example())

        return sum_in_chunks(product, [self, self._replace(cotangents=others)], weights)

    def squared_norms(self) -> Array:
        """||sum_r a_r ds_r^T||^2 for each example."""
        if self.kind in ("dense", "conv") and self._positions_are_few():
            inputs = jnp.einsum("bnri,bnsi->bnrs", self.inputs, self.inputs)
            return jnp.sum(inputs * jnp.einsum("bnro,bnso->bnrs", self.cotangents, self.cotangents), axis=(0, 2, 3))
        if self.kind == "embedding":
            indices = self._rows_read()
            # Positions meet where they read the same row; those outside of the table read none.
            same = (indices[:, :, None] == indices[:, None, :]) & (indices < self._num_rows)[:, :, None]
            products = jnp.einsum("bnro,bnso->nrs", self.cotangents, self.cotangents)
            return jnp.sum(jnp.where(same, products, 0), axis=(1, 2))
        return jnp.sum(jnp.square(self.per_example()), axis=(1, 2, 3))

    def inner_products(self) -> Array:
        """The inner products of the gradients of all (example, column), columns fastest, for several columns."""
        use = self._replace(inputs=replicated(self.inputs), cotangents=replicated(self.cotangents))
        columns, _, count, positions, _ = use.cotangents.shape
        if use.kind in ("dense", "conv") and positions == 1:
            inputs = jnp.einsum("bnri,bmri->bnm", use.inputs, use.inputs)
            outputs = jnp.einsum("cbnro,dbmro->bncmd", use.cotangents, use.cotangents)
            result = jnp.einsum("bnm,bncmd->ncmd", inputs, outputs)
            return result.reshape(count * columns, count * columns)
        rows = rows_of_columns(jax.vmap(lambda ds: use._replace(cotangents=ds).per_example())(use.cotangents))
        return rows @ rows.T

    def _summed(self, cotangents, per_example):
        if self.kind in ("scale", "shift"):
            products = cotangents if self.inputs is None else self.inputs * cotangents
            summed = jnp.sum(products, axis=2 if per_example else (1, 2))
            return summed[0][:, None, None] if per_example else summed[:, None]
        if self.kind == "embedding":
            add = jax.vmap(self._added_to_rows) if per_example else self._added_to_rows
            result = add(self._rows_read(), cotangents[0])
            result = result[:, None] if per_example else result[None]
        elif per_example:
            result = jnp.einsum("bnri,bnro->nbio", self.inputs, cotangents)
        else:
            assert self.inputs is not None
            result = sum_over_examples("bnri,bnro->bio", self.inputs, cotangents)
        return result.swapaxes(-1, -2) if self.swapped else result

    # --- embeddings -------------------------------------------------------------------------------------------------

    @property
    def _num_rows(self):
        return self.layer.shape[2 if self.swapped else 1]

    def _rows_read(self):
        """The rows that are looked up, (examples, shared); one behind the last for an index outside of the table."""
        assert self.inputs is not None
        indices, rows = self.inputs[0], self._num_rows
        return jnp.where((indices >= 0) & (indices < rows), indices, rows)

    def _added_to_rows(self, indices, values):
        indices, values = replicated(indices), replicated(values)
        zeros = jnp.zeros((self._num_rows, values.shape[-1]), values.dtype)
        return zeros.at[indices.reshape(-1)].add(values.reshape(-1, values.shape[-1]), mode="drop")

    def _positions_are_few(self):
        """Whether products of positions take fewer operations than the gradients of all examples."""
        assert self.inputs is not None
        positions, inputs, outputs = self.cotangents.shape[2], self.inputs.shape[-1], self.cotangents.shape[3]
        return positions * (inputs + outputs) <= inputs * outputs


def sum_in_chunks(function: Callable[[list[LayerUse], Array], PyTree], uses: list[LayerUse], weights: Array) -> PyTree:
    """The sum of ``function(uses, weights)`` over chunks of the examples, for one that forms their gradients.

    A chunk has so many examples that their gradients take about the memory of all inputs and cotangents.
    """
    uses = [use._replace(inputs=replicated(use.inputs), cotangents=replicated(use.cotangents)) for use in uses]
    weights = replicated(weights)
    arrays = [(use.inputs, use.cotangents) for use in uses]
    count = weights.shape[0]
    room = sum(array.size for array in jax.tree.leaves(arrays))
    gradient = sum(math.prod(use.layer.shape) for use in uses)
    chunks = -(-count // max(1, min(count, room // gradient)))
    length = -(-count // chunks)

    def of(part):
        arrays, w = part
        filled = [use._replace(inputs=i, cotangents=c) for use, (i, c) in zip(uses, arrays, strict=True)]
        return function(filled, w)

    if chunks == 1:
        return of((arrays, weights))

    def cut(array, axis):
        padding = [(0, chunks * length - count if i == axis else 0) for i in range(array.ndim)]
        padded = jnp.pad(array, padding)  # examples of no weight
        parts = padded.reshape(*array.shape[:axis], chunks, length, *array.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis, 0)

    parts = jax.tree.map(lambda array: cut(array, 1), arrays), cut(weights, 0)
    zeros = trees.zeros_like(jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.scan(lambda total, part: (trees.add(total, of(part)), None), zeros, parts)[0]


def _by_position(weights):
    return weights[:, None] if weights.ndim == 1 else weights


def with_ones(rows: Array) -> Array:
    """Every a with a one behind it: homogeneous coordinates."""
    return jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)


def sum_over_examples(spec: str, inputs: Array, cotangents: Array) -> Array:
    """An einsum over the examples: where they are sharded explicitly, the sum is on every device, as parameters are."""
    axes = [jax.typeof(array).sharding.spec for array in (inputs, cotangents)]
    explicit = any(axis is not None for spec in axes for axis in spec)
    features = (axes[0][-1], axes[1][-1])[: len(spec.split("->")[1]) - 1]
    target = jax.sharding.PartitionSpec(None, *features) if explicit else None
    return jnp.einsum(spec, inputs, cotangents, out_sharding=target)


def rows_of_columns(leaf: Array) -> Array:
    """(columns, examples, ...) as (examples * columns, entries), columns fastest."""
    leaf = replicated(leaf)
    return leaf.swapaxes(0, 1).reshape(leaf.shape[0] * leaf.shape[1], -1)


def replicated(array: Any) -> Any:
    """The array on every device where its axes are sharded explicitly: each example meets every other."""
    if array is None or not any(axis is not None for axis in jax.typeof(array).sharding.spec):
        return array
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec(*(None,) * array.ndim))
