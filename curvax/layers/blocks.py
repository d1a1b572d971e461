"""Blocks: the weights of a layer, with the bias that rides on them or apart, as matrices, and the way there and back.

The parameters of a block reach its matrices by a linear map L: it moves entries, and may scale or add them (a weight
times a constant, a sum of two leaves). Gradients pull back by L^T, so with factors on the matrices the curvature on the
parameters is L^T M L. Where L moves entries alone, L^T is its inverse; where the rows of L do not overlap, L L^T = d is
diagonal, and L^+ = L^T / d serves; elsewhere a matrix cannot be inverted block by block, and that is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax import trees
from curvax.layers.geometry import Geometry
from curvax.layers.use import LayerUse
from curvax.programs.views import places_given
from curvax.types import Array, PyTree

if TYPE_CHECKING:
    from curvax.layers.find import Layer, Layers


MAX_FACTOR = 8192
"""The largest side of a layer whose second moments are kept as a matrix; above it, as a diagonal."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Block:
    """A layer with its bias, if one rides on it, as matrices of shape (blocks, inputs, outputs).

    Attributes:
        bias: The layer of the bias; its parameters are the last row of the matrices, the homogeneous coordinate.
        bias_order: For each (block, output) the bias's feature.
    """

    layers: Layers
    weights: Layer
    bias: Layer | None
    bias_order: tuple[int, ...] = ()

    def __repr__(self) -> str:
        bias = "" if self.bias is None else f" with {self.bias.name!r}"
        return f"{type(self).__name__}({self.name!r}{bias}, shape={self.shape})"

    @property
    def name(self) -> str:
        """The name of the weights."""
        return self.weights.name

    @property
    def leaves(self) -> tuple[int, ...]:
        """The places of its leaves among those of the parameters."""
        return self.weights.leaves + (self.bias.leaves if self.bias is not None else ())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, inputs, outputs), the homogeneous coordinate counted."""
        blocks, inputs, outputs = self.weights.shape
        return blocks, inputs + (self.bias is not None), outputs

    @property
    def is_kronecker(self) -> bool:
        """Whether its curvature has Kronecker factors; not that of scales and shifts."""
        return self.weights.kind not in ("scale", "shift")

    @property
    def diagonal_factors(self) -> tuple[bool, bool]:
        """Whether the factor on the inputs and the one on the outputs are kept as diagonals.

        The second moment of the one-hot inputs of an embedding is one; a side of more than ``MAX_FACTOR`` features is
        taken for one, as its matrix would not fit.
        """
        _, inputs, outputs = self.shape
        geometries = (self.layers.geometries[m.term][m.use] for m in self.weights.members)
        one_hot = all(geometry.use.kind == "embedding" for geometry in geometries)
        return one_hot or inputs > MAX_FACTOR, outputs > MAX_FACTOR

    @functools.cached_property
    def squares(self) -> np.ndarray | None:
        """d = L L^T 1 in the shape of the matrices; None where L moves entries, and d is one."""
        if self.weights.only_moves and (self.bias is None or self.bias.only_moves):
            return None
        squares = self._squares(self.weights)
        if self.bias is None:
            return squares
        row = self._squares(self.bias).reshape(-1)[np.array(self.bias_order)]
        return np.concatenate([squares, row.reshape(squares.shape[0], 1, -1)], axis=1)

    @functools.cached_property
    def roots(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(r, q) of shapes (blocks, inputs) and (blocks, outputs) with r q^T = d^{1/2}; None where L moves entries.

        With them the curvature L^T (A (x) G) L is U (r A r (x) q G q) U^T, where U = L^T d^{-1/2} has orthonormal
        columns, so that functions of it are functions of Kronecker products.

        Raises:
            ValueError: d is no product of such a kind, or an entry of a leaf is in several of the matrices.
        """
        squares = self.squares
        if squares is None:
            return None
        root = np.sqrt(squares)
        inputs, outputs = root[:, :, 0], root[:, 0] / root[:, :1, 0]
        rounding = 1e2 * float(jnp.finfo(root.dtype).eps)
        if not np.allclose(inputs[:, :, None] * outputs[:, None], root, rtol=rounding, atol=0):
            raise ValueError(
                f"layer {self.name!r}: its entries are scaled each by a factor of its own, so that its curvature on the"
                " parameters is no Kronecker product; leave the layer to another method"
            )
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(2, *root.shape)).astype(root.dtype)
        with jax.ensure_compile_time_eval():
            move = jax.vmap(functools.partial(self.to_params, wide=True))
            moved = jax.jit(move)(np.stack([x, y, np.ones_like(x), x * y]) * root)
        # U x * U y = U 1 * U (x * y) for all x and y if every entry of a leaf is in one entry of the matrices.
        for u, v, w, z in (np.asarray(leaf) for leaf in moved.values()):
            if not np.allclose(u * v, w * z, rtol=rounding, atol=rounding):
                raise ValueError(
                    f"layer {self.name!r}: an entry of a parameter is in several of its matrices' entries, so that its"
                    " curvature on the parameters is no Kronecker product; leave the layer to another method"
                )
        return inputs, outputs

    def arranged(self, use: LayerUse) -> LayerUse:
        """A use of the layer as one of the block's matrices."""
        return use

    def to_matrices(self, gradient: PyTree, *, wide: bool = False) -> Array:
        """The gradient with respect to the matrices, from that with respect to the parameters: L^+^T g.

        In the dtype that the model has the matrices in, or with ``wide`` in float32 at least.
        """
        weights = self._to_matrices(self.weights, gradient, wide)
        if self.bias is None:
            return weights
        row = _ordered(self._to_matrices(self.bias, gradient, wide).reshape(-1), np.array(self.bias_order))
        return jnp.concatenate([weights, row.reshape(weights.shape[0], 1, -1).astype(weights.dtype)], axis=1)

    def to_params(self, matrices: Array, *, wide: bool = False) -> dict[int, Array]:
        """The change of the parameters whose matrices these are, L^+ V: the leaves of the block by their places.

        In the dtypes of the parameters, or with ``wide`` in float32 at least: squares leave the range of float16.
        """
        if self.bias is None:
            return self._to_leaves(self.weights, matrices, wide)
        row = _ordered(matrices[:, -1].reshape(-1), np.argsort(np.array(self.bias_order))).reshape(1, 1, -1)
        moved = self._to_leaves(self.weights, matrices[:, :-1], wide)
        for place, leaf in self._to_leaves(self.bias, row, wide).items():  # weights and bias may be parts of one leaf
            moved[place] = moved[place] + leaf if place in moved else leaf
        return moved

    def held(self, vector: PyTree) -> dict[int, Array]:
        """L^T d^{-1} L v: what its matrices hold of a vector, the leaves of the block by their places; ``wide``."""
        matrices = self.to_matrices(vector, wide=True)
        if self.squares is not None:
            matrices = matrices * jnp.asarray(self.squares, matrices.dtype)
        return self.to_params(matrices, wide=True)

    def _to_matrices(self, layer, tree, wide):
        leaves = jax.tree.leaves(tree)
        own = tuple(leaves[i] for i in layer.leaves)
        function, structs = layer_map(self.layers, layer, wide=wide)
        zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in structs)
        moved = jax.jvp(function, zeros, tuple(x.astype(s.dtype) for x, s in zip(own, structs, strict=True)))[1]
        return moved if layer.only_moves else moved / self._squares(layer).astype(moved.dtype)

    def _to_leaves(self, layer, matrices, wide):
        function, structs = layer_map(self.layers, layer, wide=wide)
        if not layer.only_moves:
            matrices = matrices / self._squares(layer).astype(matrices.dtype)
        like = jax.eval_shape(function, *structs)
        leaves = jax.linear_transpose(_linear(function, structs), *structs)(matrices.astype(like.dtype))
        return dict(zip(layer.leaves, leaves, strict=True))

    def _squares(self, layer):
        """d of the weights or of the bias, looked at once; ones where L moves entries."""
        known = self._known_squares
        if layer.name not in known:
            known[layer.name] = np.ones(layer.shape) if layer.only_moves else _squared_rows(self.layers, layer)
        return known[layer.name]

    @functools.cached_property
    def _known_squares(self) -> dict[str, np.ndarray]:
        return {}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BiasBlock(Block):
    """A bias apart from the weights that it could ride on: one row for each of their matrices, whose input is 1.

    Attributes:
        weights: The layer of the bias.
        owner: The layer of the weights.
    """

    owner: Layer | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        assert self.owner is not None
        blocks, _, outputs = self.owner.shape
        return blocks, 1, outputs

    @property
    def is_kronecker(self) -> bool:
        return True

    @functools.cached_property
    def squares(self) -> np.ndarray | None:
        squares = None if self.weights.only_moves else self._squares(self.weights)
        return None if squares is None else squares.reshape(-1)[np.array(self.bias_order)].reshape(self.shape)

    def arranged(self, use: LayerUse) -> LayerUse:
        rows = _ordered(use.cotangents[..., 0, :, :, :], np.array(self.bias_order))
        blocks, _, outputs = self.shape
        cotangents = jnp.moveaxis(rows.reshape(*rows.shape[:-1], blocks, outputs), -2, -4)
        ones = jnp.ones_like(cotangents.reshape(-1, *cotangents.shape[-4:])[0, ..., :1])
        return use._replace(inputs=ones, cotangents=cotangents, kind="dense")

    def to_matrices(self, gradient: PyTree, *, wide: bool = False) -> Array:
        return _ordered(self._to_matrices(self.weights, gradient, wide), np.array(self.bias_order)).reshape(self.shape)

    def to_params(self, matrices: Array, *, wide: bool = False) -> dict[int, Array]:
        row = _ordered(matrices.reshape(1, 1, -1), np.argsort(np.array(self.bias_order)))
        return self._to_leaves(self.weights, row, wide)


class Treatment(NamedTuple):
    """How curvature by Kronecker factors treats every leaf; no leaf is left out.

    Attributes:
        kronecker: The blocks with Kronecker factors.
        diagonal: The places of leaves that have the diagonal of their curvature, in part or altogether.
        covered: For each of those the entries that a Kronecker block holds, None where there are none. They have the
            curvature of the block alone, without that of further elementwise uses.
        beside: For each of those how many of its entries no block holds.
        bare: The places of leaves without curvature: unused ones, and those whose ``fallback`` is "gradient".
        reasons: Why blocks of matrices have no Kronecker factors, by name.
        incomplete: The places of leaves that Kronecker blocks hold, but not in all their dimensions, with those that
            hang together with them: entries that no operation uses are left over, and the differences of leaves that
            are added up.
    """

    kronecker: tuple[Block, ...]
    diagonal: tuple[int, ...]
    covered: tuple[np.ndarray | None, ...]
    beside: tuple[int, ...]
    bare: tuple[int, ...]
    reasons: dict[str, str]
    incomplete: tuple[int, ...]

    @property
    def dimensions(self) -> int:
        """The number of dimensions that blocks and diagonals have."""
        return sum(math.prod(block.shape) for block in self.kronecker) + sum(self.beside)

    def left_over(self, vector: PyTree) -> dict[int, Array]:
        """What of the incomplete leaves of a vector no block holds, by their places; in float32 at least."""
        if not self.incomplete:
            return {}
        leaves = jax.tree.leaves(vector)
        rest = {place: leaves[place].astype(trees.wide_dtype(leaves[place])) for place in self.incomplete}
        for block in self.kronecker:
            if set(block.leaves) & set(rest):
                held = block.held(vector)
                rest |= {place: rest[place] - leaf for place, leaf in held.items() if place in rest}
        return rest


def treatment_of(layers: Layers) -> Treatment:
    """Kronecker factors for all blocks whose matrices can be told apart, a diagonal for what else has structure."""
    reasons: dict[str, str] = {}
    fit = []
    for block in layers.blocks:
        if not block.is_kronecker:
            continue
        try:
            for layer in (block.weights, block.bias):
                if layer is not None:
                    block._squares(layer)
            layer_map(layers, block.weights)
        except ValueError as error:
            reasons[block.name] = str(error)
        else:
            fit.append(block)
    holders: dict[int, list[Block]] = {}
    for block in fit:
        for place in set(block.leaves):
            holders.setdefault(place, []).append(block)
    entries = {block.name: _entries(block) for block in fit if any(len(holders[i]) > 1 for i in block.leaves)}
    for place, own in holders.items():
        if len(own) > 1 and np.any(np.sum([entries[block.name][place] for block in own], axis=0) > 1):
            reasons |= {block.name: "shares entries of its parameters with another block" for block in own}
    kronecker = tuple(block for block in fit if block.name not in reasons)
    whole = {place for block in kronecker for place in block.leaves}
    others = {leaf for block in layers.blocks if block.name not in {b.name for b in kronecker} for leaf in block.leaves}
    shared = others & whole
    if shared:  # a leaf may be a matrix in one part and a scale or a bias of its own in another
        held = [(block, _entries(block)) for block in kronecker if set(block.leaves) & shared]
        cover = {p: np.any([e[p] > 0 for block, e in held if p in block.leaves], axis=0) for p in shared}
    else:
        cover = {}
    diagonal = set(others)
    if layers.fallback == "diagonal":
        diagonal |= set(layers.unstructured)
    bare = set(range(len(layers.paths))) - whole - diagonal
    order = tuple(sorted(diagonal))
    covered = tuple(cover.get(place) for place in order)
    beside = tuple(
        layers.structs[place].size if own is None else int(np.sum(~own))
        for place, own in zip(order, covered, strict=True)
    )
    incomplete = _incomplete(layers, kronecker, dict(zip(order, beside, strict=True)))
    return Treatment(kronecker, order, covered, beside, tuple(sorted(bare)), reasons, incomplete)


def _incomplete(layers, kronecker, beside):
    """``Treatment.incomplete``, found by counting; ``beside`` by the places of the leaves with diagonals."""
    groups: list[tuple[set[int], int]] = []  # leaves that hang together by blocks, and the dimensions of these
    for block in kronecker:
        joined, dimensions = set(block.leaves), math.prod(block.shape)
        apart = []
        for leaves, count in groups:
            if leaves & joined:
                joined, dimensions = joined | leaves, dimensions + count
            else:
                apart.append((leaves, count))
        groups = [*apart, (joined, dimensions)]
    return tuple(
        sorted(
            place
            for leaves, dimensions in groups
            if dimensions + sum(beside.get(i, 0) for i in leaves) < sum(layers.structs[i].size for i in leaves)
            for place in leaves
        )
    )


def _entries(block: Block) -> dict[int, np.ndarray]:
    """For each leaf of a block how often each of its entries is in the matrices."""
    with jax.ensure_compile_time_eval():
        moved = jax.jit(lambda: block.to_params(jnp.ones(block.shape)))()
        return {place: np.asarray(leaf != 0).astype(int) for place, leaf in moved.items()}


def blocks_of(layers: Layers) -> tuple[Block, ...]:
    """The blocks of all layers, in their order."""
    ridden, owners, known = {}, {}, {}
    for layer in layers:
        if layer.bias is not None and layer.kind in ("dense", "conv") and (order := _bias_order(layers, layer, known)):
            ridden[layer.name] = layers[layer.bias], order
            owners[layer.bias] = order, layer
    if layers.biases == "joint":
        rest = (layer for layer in layers if layer.name not in owners)
        return tuple(Block(layers, layer, *ridden.get(layer.name, (None,))) for layer in rest)
    return tuple(
        BiasBlock(layers, layer, None, *owners[layer.name]) if layer.name in owners else Block(layers, layer, None)
        for layer in layers
    )


def layer_map(layers: Layers, layer: Layer, *, wide: bool = False) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """(the leaves of a layer -> its matrices, an affine function; their structures), ``wide`` in float32 at least."""
    geometry = _first(layers, layer)
    if places_given(geometry.base):
        raise ValueError(f"layer {layer.name!r} depends on the data of a batch; its matrices are not the parameters'")

    def function(*own):
        filled: list[Any] = [None] * len(layers.paths)
        for i, leaf in zip(layer.leaves, own, strict=True):
            filled[i] = leaf
        return geometry.matrices(geometry.base_value(filled, {}, wide=wide))

    structs = tuple(layers.structs[i] for i in layer.leaves)
    return function, trees.wide_structure(structs) if wide else structs


def _linear(function, structs):
    """The linear part of an affine function."""
    zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in structs)
    return lambda *tangents: jax.jvp(function, zeros, tangents)[1]


def _squared_rows(layers, layer) -> np.ndarray:
    """d = L L^T 1, the squared lengths of the rows of L, where L L^T is diagonal."""
    function, structs = layer_map(layers, layer, wide=True)
    shape = jax.eval_shape(function, *structs)

    def gram(matrices):
        linear = _linear(function, structs)
        return linear(*jax.linear_transpose(linear, *structs)(matrices))

    probe = np.random.default_rng(0).normal(size=shape.shape).astype(shape.dtype)
    with jax.ensure_compile_time_eval():
        squares, image = (np.asarray(x) for x in jax.jit(jax.vmap(gram))(np.stack([np.ones_like(probe), probe])))
    if not np.all(squares > 0):
        raise ValueError(
            f"layer {layer.name!r}: some entries of its matrices belong to no parameter (it is padded, or joined with"
            " constants), so that factors of whole matrices are not its curvature; leave the layer to another method"
        )
    # A diagonal matrix multiplies whatever vector entry by entry; one drawn at random shows if it is not.
    rounding = 1e3 * float(jnp.finfo(shape.dtype).eps) * np.max(np.abs(squares * probe))
    if not np.max(np.abs(image - squares * probe)) <= rounding:
        raise ValueError(
            f"layer {layer.name!r}: its matrices are not the parameters moved, scaled or added, so what is worked out"
            " on the matrices cannot be taken back; leave the layer to another method"
        )
    return squares


def _ordered(rows, order):
    """Their last axis in another order."""
    return rows if np.array_equal(order, np.arange(len(order))) else rows[..., order]


def _first(layers: Layers, layer: Layer) -> Geometry:
    return layers.geometries[layer.members[0].term][layer.members[0].use]


def _bias_order(layers, layer, known) -> tuple[int, ...]:
    """For each (block, output) of a layer the feature of its bias; () where they do not match one to one.

    Every use of the layer must have one of the bias riding on it. To learn how the axes lie, each output is given the
    number of its (block, output) and is looked at as the bias sees it, once for layers that lie alike (``known``).
    """
    bias = layers[layer.bias]
    blocks, _, outputs = layer.shape
    swapped = any(member.swapped for member in layer.members)
    if swapped or bias.shape[2] != blocks * outputs or len(bias.members) != len(layer.members):
        return ()
    geometry = {member.term: {} for member in layer.members}
    for member in layer.members:
        own = layers.geometries[member.term][member.use]
        geometry[member.term][own.use] = own
    orders = set()
    for member in bias.members:
        rider = layers.geometries[member.term][member.use]
        if rider.use.rides_on is None or rider.use.rides_on[0] not in geometry.get(member.term, {}):
            return ()
        weights, permutation = rider.use.rides_on
        own = geometry[member.term][weights]
        key = _layout(rider), _layout(own), permutation
        if key not in known:
            known[key] = _seen_by(rider, own, permutation)
        orders.add(known[key])
    (first, *others) = orders
    return () if others else first


def _layout(geometry: Geometry) -> tuple[Any, ...]:
    """All that says how the axes of a use lie."""
    use = geometry.use
    axes = geometry.block_axes, geometry.in_axes, geometry.out_axes, geometry.order, geometry.feature_axes
    return *axes, geometry.groups, use.operation, use.operand_shape, use.output_shape, use.layered, use.output_axis


def _seen_by(rider: Geometry, weights: Geometry, permutation: tuple[int, ...]) -> tuple[int, ...]:
    scans = len(weights.use.scans)
    raw = jax.ShapeDtypeStruct(weights.use.output_shape, jnp.float32)
    arranged = jax.eval_shape(weights.cotangents, raw).shape

    def seen(numbers):
        # The arrangement is a permutation, so its transpose is its inverse.
        spread = jax.linear_transpose(weights.cotangents, raw)(numbers)[0]
        return rider.cotangents(spread.transpose(*range(scans), *(scans + i for i in permutation)))[0, 0, 0]

    codes = np.arange(arranged[0] * arranged[3], dtype=np.float32).reshape(arranged[0], 1, 1, arranged[3])
    with jax.ensure_compile_time_eval():
        features = np.asarray(jax.jit(seen)(np.broadcast_to(codes, arranged)))
    # A bias along another axis, which may be as long, sees the same output in all its features.
    matches = np.array_equal(np.sort(features), np.arange(codes.size))
    return tuple(int(i) for i in np.argsort(features)) if matches else ()
