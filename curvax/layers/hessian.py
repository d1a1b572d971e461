r"""The exact Hessian of every example, kept as the small matrices that it is a sum of outer products of.

For an example the gradient of a layer is a sum of outer products a_r ds_r^T over its positions r. Its Hessian has the
same structure (``alpha, beta, gamma, eta`` of the paper in one form, for any program): with e the perturbations of the
outputs of all layers at all positions, everything follows from

    a,    ds = dL/de,    K = d^2 L / de de^T,    A = da/de,

as the second derivative along a change V of the weights is u^T K u + 2 sum_r ds_r^T V (A u)_r with u_r = V a_r. The
first term holds the curvature of loss and activations, the second that one layer multiplies what another made.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.layers.find import Layers
from curvax.layers.geometry import Geometry
from curvax.layers.taps import TappedPoint
from curvax.layers.use import LayerUse
from curvax.matrices.curvature import with_penalty
from curvax.matrices.linear_map import LinearMap
from curvax.objectives.term import scale_cases
from curvax.programs.instrument import evaluate
from curvax.programs.linearize import linearize
from curvax.programs.trace import program_arguments, trace_term
from curvax.types import Array, PyTree


def layer_hessian(tapped: TappedPoint) -> LinearMap:
    r"""The Hessian of an objective as the mean over examples of structured matrices, for study and small networks.

    It is exact for any model whose parameters all have structure: dense, convolutional and recurrent layers, tied and
    shared ones, with any activations. Products and quadratic forms need no pass through the model. An example keeps
    S^2 + S sum_l |a_l| numbers for S outputs of layers, not the square of the number of parameters; see ``stored``.

    The model runs on one example at a time: what it makes from the size of its batch or from places in it, such as a
    dropout mask from a key of its own, is not seen. Hand such numbers in as inputs. Source: the low-rank structure of
    "Understanding and exploiting the low-rank structure of deep networks" (2018), eqs. 1 to 7 and appendix B.

    Returns:
        The map, with ``to_dense``, ``diagonal``, ``quadratic`` and the rest of the protocol; for objectives without a
        penalty a ``LayerHessian``.

    Raises:
        ValueError: A parameter has no structure, the model couples examples or takes batch statistics, or weights are
            finer than examples.

    Example:
        >>> objective = curvax.Objective(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["u"], curvax.losses.squared_error())
        >>> params = {"w": jnp.array([[1.0, -1.0], [2.0, 1.0]]), "u": jnp.array([[1.0], [3.0]])}
        >>> batch = (jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, params, batch), objective.linearize(params, batch))
        >>> H = jax.jit(curvax.layer_hessian)(tapped)
        >>> bool(jnp.allclose(H.to_dense(), curvax.hessian(tapped.point).to_dense(), atol=1e-5))
        True
        >>> H.stored                                                          # numbers for an example, and dense
        (28, 21)
    """
    scales = tapped.example_scales("layer_hessian")
    layers, point = tapped.layers, tapped.point
    if layers.unstructured:
        missing = [layers.paths[i] for i in layers.unstructured]
        raise ValueError(f"layer_hessian: {missing} have no structure; print(layers) says why")
    if layers.couples_examples or any(tap.given for tap in tapped.taps):
        raise ValueError("layer_hessian: the model couples examples, or computes from all of them what each meets")
    if any(geometry.use.cofactors for tap in tapped.taps for geometry in tap.uses):
        raise ValueError("layer_hessian: a parameter is multiplied by another before it meets the data")
    terms = []
    for index, (term, cases) in enumerate(zip(point.terms, point.cases, strict=True)):
        if term.example_axes != 0:
            raise ValueError("layer_hessian: the examples must be on axis 0 of everything in inputs and targets")
        alone = jax.tree.map(lambda leaf: leaf[:1], cases.inputs)
        parts = _Parts(layers, index, *trace_term(term, point.params, alone)[:2])

        def one(inputs, targets, loss=term.loss, parts=parts):
            batch = jax.tree.map(lambda leaf: leaf[None], (inputs, targets))
            return parts.of_example(loss, point.params, *batch)

        # Examples that are left out may not be finite.
        present = scale_cases(scales[index] != 0, jax.vmap(one)(cases.inputs, cases.targets))
        inputs, cotangents, curvature, responses = present
        terms.append(TermStructure(inputs, cotangents, curvature, responses, scales[index], parts))
    return with_penalty(LayerHessian(tuple(terms), point.params), point)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TermStructure:
    """The structure of one term's examples, each leaf with a leading axis of examples, lists over uses of layers."""

    inputs: list[Array | None]  # a, as the model has it
    cotangents: list[Array]  # ds
    curvature: Array  # K, shape (examples, S, S)
    responses: list[Array | None]  # A, shape (..., S); None where the input is data or indices
    scale: Array
    parts: _Parts = dataclasses.field(metadata={"static": True})


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerHessian(LinearMap):
    """The map of ``layer_hessian``, without the penalty."""

    terms: tuple[TermStructure, ...]
    params: PyTree

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self.params)

    @property
    def stored(self) -> tuple[int, int]:
        """(numbers kept for an example, numbers of a dense symmetric matrix's lower half), where terms add up."""
        kept = 0
        for term in self.terms:
            arrays = jax.tree.leaves((term.inputs, term.cotangents, term.curvature, term.responses))
            kept += sum(leaf.size // leaf.shape[0] for leaf in arrays)
        count = trees.size(self.params)
        return kept, count * (count + 1) // 2

    def quadratic(self, vector: PyTree) -> Array:
        trees.check_like(vector, self.params, "vector")
        total = jnp.zeros((), jnp.float32)
        for term in self.terms:

            def one(inputs, cotangents, curvature, responses, parts=term.parts):
                return parts.quadratic(vector, inputs, cotangents, curvature, responses)

            each = jax.vmap(one)(term.inputs, term.cotangents, term.curvature, term.responses)
            total = trees.add(jnp.sum(term.scale.astype(each.dtype) * each), total)
        return total

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.params, "vector")
        return trees.scale(0.5, jax.grad(self.quadratic)(vector))


class _Use(NamedTuple):
    """One use of a layer: what ``LayerUse`` needs to know, and the geometry of its own arrays."""

    own: Geometry
    matrices: Geometry
    kind: str
    swapped: bool
    term: int
    layer: Any

    def gradient(self, inputs, cotangents):
        """sum_r a_r ds_r^T, (blocks, inputs, outputs), from arrays as the model has them."""
        arranged = self.own.inputs(inputs)
        return LayerUse(
            arranged, self.own.cotangents(cotangents), self.matrices, self.kind, self.swapped, self.term, self.layer
        ).per_example()[0]


class _Parts:
    """The uses of one term, equal to itself alone, so that it may be static to jax."""

    def __init__(self, layers: Layers, index: int, program, out_tree):
        self.program, self.out_tree = program, out_tree
        found = layers.geometries_at(index, program)
        self.found, self.uses = [], []
        for layer in layers:
            for member in layer.members:
                if member.term == index:
                    self.found.append(found[member.use].use)
                    self.uses.append(_use_of(layer, member, found))

    def of_example(self, loss, params, inputs, targets):
        """(a, ds, K, A) of one example, whose batch axis has length one."""
        zeros = [use.zeros() for use in self.found]
        flat_zeros, unravel = ravel_pytree(zeros)
        flat = program_arguments(params, inputs)

        def run(perturbations):
            epsilons = unravel(perturbations)
            results, captured, *_ = evaluate(self.program, flat, self.found, epsilons, perturb=jnp.add)
            outputs, _ = jax.tree.unflatten(self.out_tree, results)
            return jnp.sum(loss.value(outputs, targets)), captured

        def inputs_of(perturbations):
            captured = run(perturbations)[1]
            return [
                None if a is None or use.kind == "embedding" else a for use, a in zip(self.found, captured, strict=True)
            ]

        (_, captured), cotangents = jax.value_and_grad(run, has_aux=True)(flat_zeros)
        directions = jnp.eye(flat_zeros.size, dtype=flat_zeros.dtype)
        bend = linearize(jax.grad(lambda e: run(e)[0]), flat_zeros).jvp
        curvature = jax.vmap(bend)(directions)
        responses = jax.vmap(linearize(inputs_of, flat_zeros).jvp, out_axes=-1)(directions)
        return captured, unravel(cotangents), curvature, responses

    def quadratic(self, vector, inputs, cotangents, curvature, responses):
        """u^T K u + 2 sum_l <V_l, sum_r (A u)_r ds_r^T> of one example."""
        matrices = [self._matrices(use, vector) for use in self.uses]
        moved = []
        for use, matrix, a, ds in zip(self.uses, matrices, inputs, cotangents, strict=True):
            _, back = jax.vjp(lambda ds, use=use, a=a: use.gradient(a, ds), ds)
            moved.append(back(matrix.astype(ds.dtype))[0])
        u, _ = ravel_pytree(moved)
        total = u @ curvature @ u
        for use, matrix, response, ds in zip(self.uses, matrices, responses, cotangents, strict=True):
            if response is not None:
                total = total + 2 * jnp.sum(matrix * use.gradient(response @ u, ds))
        return total

    def _matrices(self, use, vector):
        """The change of a layer's matrices along a change of the parameters."""
        leaves = jax.tree.leaves(vector)
        places = use.layer.leaves

        def matrices(*values):
            filled: list[Any] = [None] * len(leaves)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            return use.matrices.matrices(use.matrices.base_value(filled, {}))

        zeros = tuple(jnp.zeros_like(leaves[i]) for i in places)
        # Affine in the leaves: its derivative anywhere is its linear part.
        return jax.jvp(matrices, zeros, tuple(leaves[i] for i in places))[1]


def _use_of(layer, member, found):
    own = found[member.use]
    first = layer.members[0]
    if member.swapped and first.term != member.term:
        raise ValueError(f"layer_hessian: {layer.name} is tied across terms of the objective")
    # The matrices of a use that is swapped are those of the layer's first use.
    matrices = found[first.use] if member.swapped else own
    return _Use(own, matrices, own.use.kind, member.swapped, member.term, layer)
