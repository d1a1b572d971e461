"""The recursion of Becker and LeCun: a diagonal by one backward sweep of squares, which ignores what is off it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.layers.diagonals import with_penalty
from curvax.objectives.output_matrix import OutputMatrix, unit_vector
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import scale_cases
from curvax.programs.linearize import linearize
from curvax.programs.record import Step, pull_back, record_term
from curvax.types import Array, PyTree


def becker_lecun_diagonal(at: CurvaturePoint, *, hessian: bool = False) -> PyTree:
    r"""The diagonal of the Gauss-Newton matrix or the Hessian, penalty included, as Becker and LeCun approximate it.

    From the diagonal of the loss's Hessian at the outputs, second derivatives go backwards through every operation by
    the squares of its Jacobian: q_x = (J * J)^T q_y, so q_a = sq(W)^T q_s at a layer, q_s = sq(phi'(s)) q_a at an
    activation, and sq(a) q_s at a weight. With ``hessian=True`` an activation adds phi''(s) da, and negative values may
    come out. It takes one backward sweep, with ``hessian=True`` another for da, has no noise, and is biased wherever
    operations mix their inputs: exact for the last layer, and for networks whose outputs each depend on paths of their
    own (LeCun et al. 1998 use it for learning rates). ``chapelle_erhan_diagonal`` and ``sampled_hessian_diagonal`` are
    unbiased, by one and by three sweeps. Source: Becker and LeCun 1989; LeCun, Bottou, Orr and Mueller 1998, section 7;
    Martens 2016, section 4.9.2.

    Args:
        at: The curvature point; of any model made of products, sums, elementwise functions and moves.
        hessian: The Hessian's diagonal (Becker and LeCun 1989) in place of the Gauss-Newton matrix's (LeCun 1998).

    Raises:
        ValueError: The model has an operation without a rule, which is named.

    Example:
        >>> objective = curvax.Objective(lambda w, x: jnp.tanh(x * w), curvax.losses.squared_error())
        >>> at = objective.linearize(jnp.ones(2), (jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))))
        >>> estimate = curvax.estimators.becker_lecun_diagonal(at, hessian=True)
        >>> bool(jnp.allclose(estimate, curvax.hessian(at).diagonal()))                  # nothing is mixed here
        True
    """
    total = trees.zeros_like(at.params)
    for term, cases, piece in zip(at.terms, at.cases, at.pieces(), strict=True):
        recorded = record_term(term, at.params, cases.inputs)
        cotangents: dict[int, Array] = {}
        if hessian:
            gradient = scale_cases(cases.scale, piece.loss.gradient(piece.outputs, piece.targets))
            cotangents = recorded.program.sweep(recorded.at_outputs(gradient), pull_back)
        matrix = piece.loss.hessian if hessian else piece.loss.curvature
        diagonal = scale_cases(cases.scale, _diagonal(matrix(piece.outputs, piece.targets), piece.outputs))
        diagonal = trees.cast_like(diagonal, piece.outputs)

        def rule(step, at_results, cotangents=cotangents):
            return _squares_backwards(step, at_results, cotangents)

        arrived = recorded.program.sweep(recorded.at_outputs(diagonal), rule)
        total = trees.add(total, recorded.to_params(arrived, total))
    return with_penalty(at, total)


def _squares_backwards(step: Step, at_results: list[Array], cotangents: dict[int, Array]) -> list[Array]:
    """(J * J)^T q for one operation, and the bend of an elementwise one times the loss's derivative at its result."""
    if step.elementwise:
        return [_through_elementwise(step, i, at_results, cotangents) for i in range(len(step.variables))]
    if step.bilinear:
        return [_through_product(step, i, at_results) for i in range(len(step.variables))]
    if step.selects:
        return list(step.pull_back(at_results))
    raise ValueError(
        f"becker_lecun_diagonal has no rule for the operation `{step.site.name}` of the model; use"
        " curvax.estimators.chapelle_erhan_diagonal or sampled_hessian_diagonal, which take any model"
    )


def _through_elementwise(step, index, at_results, cotangents):
    arrays = [x.array for x in step.variables]

    def alone(x):
        return step.function(*arrays[:index], x, *arrays[index + 1 :])

    def slopes(x):
        return linearize(alone, x).jvp(jnp.ones_like(x))

    bending = linearize(slopes, arrays[index])
    slope, bend = bending.value, bending.jvp(jnp.ones_like(arrays[index]))
    results = zip(step.moving, slope, bend, at_results, strict=True)
    parts = [d * d * q + dd * cotangents.get(id(out), 0) for out, d, dd, q in results]
    total, shape = jnp.asarray(sum(parts)), arrays[index].shape
    added = range(total.ndim - len(shape))  # where it was broadcast
    total = jnp.sum(total, axis=tuple(added))
    ones = [axis for axis, length in enumerate(shape) if length != total.shape[axis]]
    return jnp.sum(total, axis=tuple(ones), keepdims=True).astype(arrays[index].dtype)


def _through_product(step, index, at_results):
    """The products with squares in place of the other operand."""
    # By place, as both operands may be one and the same value.
    place = [i for i, x in enumerate(step.inputs) if x.varies][index]
    squares = [jnp.square(x.array) for x in step.inputs]

    def product(x):
        return step.product(*squares[:place], x, *squares[place + 1 :])

    return jax.linear_transpose(product, step.inputs[place].array)(at_results[0])[0]


def _diagonal(matrix: OutputMatrix, outputs: PyTree) -> PyTree:
    """The diagonal of every case's matrix, by a product with each unit vector."""

    def add_column(total, column):
        vector = unit_vector(outputs, column)
        return trees.add(total, trees.multiply(vector, matrix.product(vector))), None

    columns = jnp.arange(trees.size(trees.example_structure(outputs)))
    return jax.lax.scan(add_column, trees.zeros_like(outputs), columns)[0]
