"""Structural damping: a penalty on how much a step changes intermediate quantities of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.damping.matrices import Damping, Tikhonov
from curvax.layers.find import Layers
from curvax.matrices.curvature import Curvature, Fisher, GaussNewton
from curvax.matrices.linear_map import LinearMap
from curvax.objectives.loss import OutputLoss
from curvax.objectives.losses import SquaredError
from curvax.objectives.output_matrix import OutputMatrix
from curvax.objectives.point import CurvaturePoint, Packed, linearize_term
from curvax.objectives.term import Term
from curvax.programs.instrument import evaluate
from curvax.programs.trace import program_arguments, trace_term
from curvax.types import Array, PyTree, Scalar


@dataclasses.dataclass(frozen=True, eq=False)
class Structural(Damping):
    r"""Damping by lambda mu D_k with D_k the Gauss-Newton matrix of K = mean_i d(c(theta, x_i), c(theta_k, x_i)).

    c are intermediate quantities, such as the hidden states of a recurrent network, whose change a step is to be
    charged for even where the loss does not feel it; d is a loss that measures the change. K has no slope at theta_k,
    so the damped model is M + lambda/2 delta^T (D + mu D_k) delta with D from ``base``. The model is extended by the
    outputs c, so one push forward and one pull back serve G and D_k together. The sum over the axes of c, such as time,
    is taken as for every loss.

    The model names c by returning it: make the objective with ``has_aux=True`` and let the model return
    (outputs, aux); terms without aux are not damped in this way. Or c are the outputs of layers that
    ``curvax.find_layers`` found, and the model stays as it is. Source: Martens and Sutskever 2011; Martens 2016,
    section 4.6.4.

    Attributes:
        intermediates: aux -> c, a pytree of floating-point arrays with the examples on axis 0; or
            ``curvax.damping.LayerOutputs(layers, names)``.
        strength: mu; Martens and Sutskever take 1/30 for recurrent networks. May be traced.
        relative: Whether mu is multiplied by lambda and so adapts with it, or stays as it is. The sources do not say
            which of the two they did; a fixed mu goes on holding the intermediate quantities in place once the model
            is trusted, and then stalls the learning of long time lags (``benchmarks.rnn_tasks``).
        loss: d, ``squared_error`` by default; ``sigmoid_binary_cross_entropy`` for c the inputs of sigmoid units.
        base: The damping that lambda scales; Tikhonov's by default.

    Raises:
        ValueError: When called: no term has aux, an array of c has no example axis of the batch's length, or the
            curvature is the Hessian.

    Example:
        >>> def model(w, x):
        ...     hidden = x * w[0]
        ...     return hidden * w[1], hidden
        >>> objective = curvax.Objective(model, curvax.losses.squared_error(), has_aux=True)
        >>> at = objective.linearize(jnp.array([1.0, 2.0]), (jnp.ones((1, 1)), jnp.zeros((1, 1))))
        >>> damping = curvax.damping.structural(lambda hidden: hidden, strength=3.0, relative=False)
        >>> damping.matrix(at, curvax.GaussNewton(), 0.5, jax.random.key(0)).to_dense()
        Array([[7.5, 2. ],
               [2. , 1.5]], dtype=float...)

    It is [2, 1]^T [2, 1] + diag(3, 0) + 0.5 I.
    """

    intermediates: Callable[[PyTree], PyTree] | LayerOutputs
    _: dataclasses.KW_ONLY
    strength: Scalar = 1 / 30
    relative: bool = True
    loss: OutputLoss | None = None
    base: Damping | None = None

    def matrix(self, at: CurvaturePoint, curvature: Curvature, strength: Scalar, key: jax.Array) -> LinearMap:
        if not isinstance(curvature, (GaussNewton, Fisher)):
            raise ValueError("structural damping extends curvax.GaussNewton() or curvax.Fisher()")
        weight = jnp.asarray(self.strength)
        if self.relative:
            weight = weight.astype(jnp.result_type(strength)) * strength
        return (self.base or Tikhonov()).matrix(self._extended(at, weight), curvature, strength, key)

    def added(self, matrix: LinearMap, strength: Scalar, key: jax.Array) -> LinearMap:
        raise ValueError("structural damping extends the model, not a matrix that is there; use curvax.hessian_free")

    def _extended(self, at: CurvaturePoint, weight: jax.Array) -> CurvaturePoint:
        """The point of the model with outputs (z, c); mu travels with the targets, where it may be traced."""
        models = [_extended_model(self.intermediates, index, term) for index, term in enumerate(at.terms)]
        if all(model is None for model in models):
            raise ValueError(
                "structural damping reads the intermediate quantities off the model's auxiliary outputs: let the model"
                " return (outputs, aux) and make the objective with has_aux=True; or name layers, with"
                " curvax.damping.LayerOutputs"
            )
        terms, all_cases, linearizations = [], [], []
        for index, (term, cases) in enumerate(zip(at.terms, at.cases, strict=True)):
            if models[index] is not None:
                axes = term.example_axes
                inputs_axes, targets_axes = axes if isinstance(axes, (tuple, list)) else (axes, axes)
                count = at.num_examples(index)
                term = dataclasses.replace(
                    term,
                    model_fn=models[index],
                    loss=_WithIntermediates(term.loss, self.loss or SquaredError()),
                    example_axes=(inputs_axes, (targets_axes, 0)),
                    has_aux=False,
                )
                targets = cases.targets, jnp.full((count,), weight)
                cases = dataclasses.replace(cases, packed=Packed.of((cases.inputs, targets)))
                _, chosen = jax.eval_shape(lambda p, x, term=term: term.apply(p, x)[0], at.params, cases.inputs)
                _check_cases(chosen, cases.scale.shape or (count,))
            if at.chunk_size is None:
                linearizations.append(linearize_term(term, at.packed_params, cases.inputs)[0])
            terms.append(term)
            all_cases.append(cases)
        return dataclasses.replace(
            at,
            terms=tuple(terms),
            cases=tuple(all_cases),
            linearizations=tuple(linearizations) if at.chunk_size is None else None,
            packed_aux=(),
        )


structural = Structural


@dataclasses.dataclass(frozen=True)
class LayerOutputs:
    """The outputs of some layers as intermediate quantities, for ``structural``.

    The output of a bias is the sum that it completes: name the bias of a layer to mean what goes into its activation.
    """

    layers: Layers
    names: tuple[str, ...]

    def extended(self, index: int, term: Term) -> Callable[[PyTree, PyTree], tuple[PyTree, Array]] | None:
        """(params, inputs) -> (z, outputs of the layers) for the term of that index; None if it has none of them.

        The outputs are one array of shape (examples, all units at all positions).
        """
        chosen_layers = [self.layers[name] for name in self.names]
        places = sorted(m.use for layer in chosen_layers for m in layer.members if m.term == index)
        if not places:
            return None

        def model(params: PyTree, inputs: PyTree) -> tuple[PyTree, Array]:
            program, out_tree, _ = trace_term(term, params, inputs)
            geometries = self.layers.geometries_at(index, program)
            chosen = [geometries[place] for place in places]
            flat = program_arguments(params, inputs)
            uses = [geometry.use for geometry in chosen]
            results, _, outputs, _ = evaluate(program, flat, uses, [None] * len(uses))
            arranged = [g.cotangents(raw).swapaxes(0, 1) for g, raw in zip(chosen, outputs, strict=True)]
            flat_outputs = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in arranged], axis=1)
            return jax.tree.unflatten(out_tree, results)[0], flat_outputs

        return model


def _extended_model(intermediates, index, term):
    """(params, inputs) -> (z, c) of a term, or None if it has no intermediates."""
    if isinstance(intermediates, LayerOutputs):
        return intermediates.extended(index, term)
    return _Extended(term.model_fn, intermediates) if term.has_aux else None


@dataclasses.dataclass(frozen=True)
class _Extended:
    """(params, inputs) -> (z, c)."""

    model_fn: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    intermediates: Callable[[PyTree], PyTree]

    def __call__(self, params, inputs):
        outputs, aux = self.model_fn(params, inputs)
        chosen = self.intermediates(aux)
        trees.check_floating(chosen, "the intermediates of structural damping")
        return outputs, chosen


def _check_cases(chosen, shape):
    for path, leaf in zip(trees.leaf_paths(chosen), jax.tree.leaves(chosen), strict=True):
        if leaf.shape[: len(shape)] != shape:
            raise ValueError(
                f"structural damping: intermediates[{path!r}] of shape {leaf.shape} must begin with {shape}, the axes"
                " of the cases; move the examples to axis 0 in the model or in intermediates="
            )


@dataclasses.dataclass(frozen=True)
class _WithIntermediates(OutputLoss):
    """The curvature of L(y, z) + mu d(c, c_k) on outputs (z, c), with targets (y, mu) and mu one number an example."""

    loss: OutputLoss
    distance: OutputLoss
    has_value = False

    def value(self, outputs, targets):
        return self.loss.value(outputs[0], targets[0])

    def curvature(self, outputs, targets):
        return self._with(self.loss.curvature(outputs[0], targets[0]), outputs, targets)

    def fisher(self, outputs, targets=None):
        if targets is None:
            raise ValueError("the strength of structural damping travels with the targets, and they are None")
        return self._with(self.loss.fisher(outputs[0], targets[0]), outputs, targets)

    def _with(self, matrix, outputs, targets):
        return _Pair(matrix, self.distance.fisher(outputs[1]), targets[1])


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Pair(OutputMatrix):
    """The block-diagonal matrix diag(first, weight * second) on pairs of outputs."""

    first: OutputMatrix
    second: OutputMatrix
    weight: jax.Array

    @property
    def root_structure(self) -> PyTree:
        return self.first.root_structure, self.second.root_structure

    def product(self, vector):
        return self.first.product(vector[0]), trees.scale_rows(self.weight, self.second.product(vector[1]))

    def sqrt_product(self, vector):
        root = jnp.sqrt(self.weight)
        return self.first.sqrt_product(vector[0]), trees.scale_rows(root, self.second.sqrt_product(vector[1]))

    def sqrt_transpose_product(self, vector):
        root = jnp.sqrt(self.weight)
        second = trees.scale_rows(root, self.second.sqrt_transpose_product(vector[1]))
        return self.first.sqrt_transpose_product(vector[0]), second

    def pinv_product(self, vector):
        inverse = jnp.where(self.weight > 0, 1 / jnp.where(self.weight > 0, self.weight, 1), 0)
        return self.first.pinv_product(vector[0]), trees.scale_rows(inverse, self.second.pinv_product(vector[1]))
