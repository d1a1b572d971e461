"""A model as a chain of dense layers with elementwise functions between, and what recursions along it are made of."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import trees
from curvax.layers.blocks import BiasBlock, Block
from curvax.layers.factors import sum_over_sweeps, without_cotangents
from curvax.layers.geometry import Geometry
from curvax.layers.taps import TappedPoint
from curvax.matrices.curvature import OutputCurvature
from curvax.objectives.point import Piece
from curvax.objectives.term import scale_cases, weighted_sum
from curvax.programs.chain import Link, chain_of
from curvax.programs.instrument import detached, evaluate
from curvax.programs.linearize import is_affine
from curvax.programs.trace import program_arguments, trace_term
from curvax.programs.views import places_given
from curvax.types import Array, PyTree


def dense_chain(tapped: TappedPoint, name: str) -> DenseChain:
    """The chain of a tapped point; for ``name``, in errors.

    Raises:
        ValueError: There is none: a parameter is neither the weights of a dense layer nor its bias, a layer is used
            more than once, or between two layers stands what is no elementwise function.
    """
    scales, layers, point = tapped.example_scales(name), tapped.layers, tapped.point
    if len(point.terms) != 1:
        raise ValueError(f"{name}: the objective has {len(point.terms)} terms; the recursion is along one chain")
    others = [*layers.treatment.diagonal, *layers.unstructured]
    if others:
        paths = ", ".join(layers.paths[i] for i in sorted(set(others)))
        raise ValueError(
            f"{name}: {paths} is neither the weights of a dense layer nor a bias that is added to the results of one,"
            f" a number for each of them; {_ADVICE}"
        )
    for block in layers.treatment.kronecker:
        _check_dense(block, tapped, name)
    inputs = point.cases[0].inputs
    blocks, uses = layers.treatment.kronecker, tapped.taps[0].uses
    found: list[Geometry] = [uses[block.weights.members[0].use] for block in blocks]
    program, out_tree, num_outputs = trace_term(point.terms[0], point.params, inputs)
    try:
        names = [block.name for block in blocks]
        links = chain_of(program, [geometry.use for geometry in found], names, num_outputs)
        geometries = [found[link.use] for link in links]
        pairs = zip(geometries, geometries[1:], links[1:], strict=False)
        orders = [None, *(_order(before, own, link, names) for before, own, link in pairs)]
    except ValueError as error:
        raise ValueError(f"{name}: the layers are no chain of dense ones: {error}; {_ADVICE}") from None

    def pieces(perturbations: list[Array]) -> tuple[list[Array], PyTree]:
        """(inputs of all layers, outputs) as functions of what is added to the results of the layer before."""
        arguments = program_arguments(point.params, inputs)
        own = [geometry.use for geometry in geometries]
        results, captured, *_ = evaluate(program, arguments, own, perturbations, perturb=detached)
        return captured, jax.tree.unflatten(out_tree, results)[0]

    return DenseChain(tapped, point.pieces()[0], scales[0], links, geometries, orders, pieces)


def _check_dense(block: Block, tapped: TappedPoint, name: str) -> None:
    """Raises a ValueError unless the block is one matrix that is used once, by every example."""
    layer = block.weights
    geometry = tapped.taps[layer.members[0].term].uses[layer.members[0].use]
    if isinstance(block, BiasBlock):
        what = "is apart from its weights (find_layers(..., bias='joint') joins them)"
    elif layer.kind != "dense":
        what = f"is of kind {layer.kind!r}"
    elif len(layer.members) > 1:
        what = f"is used {len(layer.members)} times"
    elif block.shape[0] > 1 or geometry.use.scans:
        what = "is several matrices, or stands in a loop"
    elif layer.shared > 1:
        what = f"is shared by {layer.shared} positions of each example"
    elif geometry.use.cofactors or places_given(geometry.base):
        what = "is multiplied by another parameter or by data"
    else:
        return
    raise ValueError(f"{name}: the layers are no chain of dense ones: {layer.name!r} {what}; {_ADVICE}")


_ADVICE = (
    "curvax.kfac and curvax.kronecker_map take any layers, and a function between two layers that is elementwise in"
    " truth can be written with elementwise operations"
)


def _order(before: Geometry, own: Geometry, link: Link, names: Sequence[str]) -> np.ndarray | None:
    """For each input of a layer the result of the layer before that it is a function of; None where they are in order.

    Raises:
        ValueError: They are not the same for every example, or not each of them.
    """
    assert link.codes is not None
    # NumPy's arrays are arranged by NumPy, and nothing is compiled for it.
    shape = before.use.output_shape
    numbers: Any = np.arange(np.prod(shape)).reshape(shape)
    codes: Any = link.codes
    results, inputs = (np.asarray(x)[0, :, 0] for x in (before.cotangents(numbers), own.inputs(codes)))
    if np.array_equal(results, inputs):
        return None
    places = np.argsort(results[0])
    found = np.searchsorted(results[0][places], inputs[0])
    order = places[np.minimum(found, len(places) - 1)]
    if inputs.shape != results.shape or not np.array_equal(results[:, order], inputs):
        raise ValueError(f"the inputs of {names[link.use]!r} are not the results of the layer before, each once")
    return order


@dataclasses.dataclass(frozen=True, eq=False)
class DenseChain:
    """A chain of dense layers at a point, s_t = h_{t-1} W_t and h_t = phi_t(s_t) entry by entry, first to last.

    Attributes:
        piece: The term's loss, outputs and targets.
        scale: The factor of each example's loss.
        orders: For each layer how its inputs are ordered among the results of the one before, None as they are.
        pieces: (perturbations) -> (inputs, outputs), each a function of the perturbation of the layer before alone.
    """

    tapped: TappedPoint
    piece: Piece
    scale: Array
    links: list[Link]
    geometries: list[Geometry]
    orders: list[np.ndarray | None]
    pieces: Callable[[list[Array]], tuple[list[Array], PyTree]]

    def __len__(self) -> int:
        return len(self.links)

    def by_block(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Values of the layers of the chain in the order of ``layers.treatment.kronecker``."""
        return tuple(value for _, value in sorted(zip([link.use for link in self.links], values, strict=True)))

    def in_results(self, t: int, matrix: Array) -> Array:
        """A matrix on the inputs of layer t as one on the results of the layer before."""
        order = self.orders[t]
        if order is None:
            return matrix
        inverse = np.argsort(order)
        return matrix[..., inverse, :][..., inverse]

    def weights(self) -> list[Array]:
        """W_t, (inputs, outputs)."""
        leaves = jax.tree.leaves(self.tapped.point.params)
        return [geometry.matrices(geometry.base_value(leaves, {}, wide=True))[0] for geometry in self.geometries]

    def inputs(self) -> list[Array]:
        """h_{t-1}, (examples, inputs)."""
        uses = self._uses(without_cotangents(self.tapped))
        return [use.inputs[0, :, 0] for use in uses if use.inputs is not None]

    def first_derivatives(self) -> list[Any]:
        """phi' of what comes before each layer, (examples, inputs), in the order of its inputs.

        By forward-mode differentiation along ones: the layers are cut apart, so that one sweep serves all of them. The
        first layer reads data, and has None.
        """
        with _forward_rules():
            return self._arranged(self._along_ones(self._later_inputs)(self._zeros())[1])

    def derivatives(self) -> tuple[list[Any], list[Any]]:
        """(phi', phi'') of what comes before each layer, likewise."""
        with _forward_rules():
            _, (first, second) = self._along_ones(self._along_ones(self._later_inputs))(self._zeros())
            return self._arranged(first), self._arranged(second)

    def gradients(self, scaled: bool = True) -> list[Array]:
        """The gradient of each example's loss in s_t, (examples, outputs); times its factor or not."""
        piece = self.piece
        cotangents = piece.loss.gradient(piece.outputs, piece.targets)
        return self._by_layer((scale_cases(self.scale, cotangents) if scaled else cotangents,))

    def second_moments(self, curvature: OutputCurvature, key: Array | None) -> list[Array]:
        """sum_i scale_i g_i g_i^T of the gradients g in s_t whose second moment is that curvature."""

        def moments(uses):
            return [use.output_factor()[0] for use in self._uses(uses)]

        return sum_over_sweeps(self.tapped, key, curvature, moments)

    @property
    def is_convex(self) -> bool:
        """Whether the loss is convex in the results of the last layer: in the outputs, which are affine in them."""
        with _forward_rules():
            return self.piece.loss.convex and is_affine(self._outputs, self.geometries[-1].use.zeros())

    def last_hessian(self, scale: Array, by_example: bool = False) -> Array:
        """sum_i scale_i of the Hessians of the examples' losses in the results of the last layer; or each of them."""

        def loss(e):
            return weighted_sum(scale, self.piece.loss.value(self._outputs(e), self.piece.targets))

        with _forward_rules():
            _, product = jax.linearize(jax.grad(loss), self._zeros()[-1])
            return self._columns(product, by_example)

    def last_gauss_newton(self, scale: Array) -> Array:
        """The same of J^T C J, with C what the loss has as its ``curvature`` on the outputs."""
        matrix = self.piece.loss.curvature(self.piece.outputs, self.piece.targets)
        zero = self._zeros()[-1]
        with _forward_rules():
            _, push = jax.linearize(self._outputs, zero)
            pull = jax.linear_transpose(push, zero)
            return self._columns(lambda v: pull(scale_cases(scale, matrix.product(push(v))))[0], False)

    def _columns(self, product, by_example):
        """A symmetric matrix for each example, or their sum, from its products with unit vectors."""
        geometry = self.geometries[-1]
        zero = geometry.use.zeros()
        shape = jax.eval_shape(geometry.cotangents, zero).shape

        def column(index):
            unit = jnp.broadcast_to((jnp.arange(shape[-1]) == index).astype(zero.dtype), shape)
            # How cotangents are arranged is a permutation, so its transpose is its inverse.
            (direction,) = jax.linear_transpose(geometry.cotangents, zero)(unit)
            own = geometry.cotangents(product(direction))[0, :, 0]
            own = own.astype(trees.wide_dtype(own))
            return own if by_example else jnp.sum(own, axis=0)

        # Some columns at a time: each holds the outputs of all examples.
        return jax.lax.map(column, jnp.arange(shape[-1]), batch_size=64)

    def _outputs(self, last):
        return self.pieces([*self._zeros()[:-1], last])[1]

    def _later_inputs(self, perturbations):
        return self.pieces(perturbations)[0][1:]

    def _along_ones(self, function):
        """Perturbations -> (value, derivative along ones) of a function of them."""
        ones = [jnp.ones_like(zero) for zero in self._zeros()]
        return lambda e: jax.jvp(function, (e,), (ones,))

    def _arranged(self, raws):
        """What belongs to the inputs of all layers but the first, as (examples, inputs)."""
        found: list[Any] = [None]
        for geometry, raw in zip(self.geometries[1:], raws, strict=True):
            arranged = geometry.inputs(raw)
            assert arranged is not None
            found.append(arranged[0, :, 0].astype(trees.wide_dtype(arranged)))
        return found

    def _zeros(self):
        return [geometry.use.zeros() for geometry in self.geometries]

    def _by_layer(self, cotangents):
        return [use.cotangents[0, :, 0] for use in self._uses(self.tapped.pull_back(cotangents))]

    def _uses(self, uses):
        groups = self.tapped.by_layer(uses)
        blocks = self.tapped.layers.treatment.kronecker
        return [groups[blocks[link.use].weights.name][0] for link in self.links]


@contextlib.contextmanager
def _forward_rules():
    """Says what to do where JAX cannot differentiate what stands between the layers forwards."""
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        text = str(error)
        if "custom_vjp" in text or "custom_lin" in text or "forward-mode" in text:
            raise ValueError(
                "the recursion takes derivatives of activations forwards, and one of them has a custom_vjp, which is a"
                " rule for reverse mode alone; give it a custom_jvp, or take curvature='fisher'"
            ) from error
        raise
