r"""Layer-wise recursions: Hessian blocks that follow from one another, from the outputs back to the first layer.

Along a chain of dense layers with elementwise functions between, h_t = phi_t(s_t) with s_t = h_{t-1} W_t + b_t, the
Hessian of one example's loss with respect to s_t, and so to the bias, follows from that of the next layer:

    H_t = phi_t' phi_t'^T * (W_{t+1} H_{t+1} W_{t+1}^T) + diag(phi_t'' * (W_{t+1} g_{t+1}))

with g the gradient in s and * entry by entry; the block of W_t is h_{t-1} h_{t-1}^T (x) H_t. Over a batch every factor
is replaced by its mean, which keeps one small matrix for each layer. What is done to the second term says which matrix
comes out: as it is the Hessian, its absolute values or its positive part the positive-curvature Hessian (PCH-1, PCH-2),
nothing of it the Gauss-Newton matrix (KFRA).

Sources: Chen, Hsu, Gonzalez Pardo and Chou 2018 ("PCH" and "EA-CG"), eqs. 4 to 8; Botev, Ritter and Barber 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.checks import check_choice
from curvax.layers.dense_chain import dense_chain
from curvax.layers.factors import KroneckerFactors
from curvax.layers.find import Layers
from curvax.layers.kronecker import apply_on_blocks, kronecker_map, root_of
from curvax.layers.taps import TappedPoint, tap
from curvax.layers.use import sum_over_examples
from curvax.matrices.curvature import EmpiricalFisher, Fisher, with_penalty
from curvax.matrices.linear_map import LinearMap
from curvax.objectives.objective import compiled_if_eager
from curvax.types import Array, PyTree

LayerwiseCurvature = Literal["pch1", "pch2", "gauss_newton", "fisher", "empirical_fisher", "hessian"]
InputMoments = Literal["second", "rank_one"]


def layerwise_curvature(
    tapped: TappedPoint,
    curvature: LayerwiseCurvature = "pch1",
    key: Array | None = None,
    *,
    inputs: InputMoments = "second",
) -> LinearMap:
    r"""A block-diagonal curvature matrix with blocks E[h h^T] (x) H_t for weights and H_t for biases, by recursion.

    The matrices H_t are means over the batch, worked out with expectations in place of examples: exact for a batch of
    one and, of the last layer, for every batch. ``curvature`` says which:

    - "pch1", "pch2": the positive-curvature Hessian, positive semi-definite for any weights and loss. The Hessian of
      the loss and the second derivatives of the activations have their negative eigenvalues replaced by absolute values
      ("pch1"; of the loss in both) or by zero.
    - "hessian": the expectation approximation of the Hessian as it is, which may be indefinite.
    - "gauss_newton": without second derivatives of the activations, as in KFRA; what the loss has as its ``curvature``
      is where it begins, without negative eigenvalues.
    - "fisher": E[g g^T] at targets drawn from the model, by one backward pass; "empirical_fisher" at those given.

    The model may be written in any framework and spelling: what stands between two layers is found in its program, and
    its derivatives by forward-mode differentiation.

    Args:
        key: For "fisher".
        inputs: "second" for E[h h^T]; "rank_one" for E[h] E[h]^T, which EA-CG puts in its place.

    Returns:
        A ``KroneckerMap``, with the penalty of the objective.

    Raises:
        ValueError: The layers are no chain of dense ones with elementwise functions between; says which operation, or
            which parameter, stands in the way.

    Example:
        >>> def network(params, x):
        ...     return jax.nn.sigmoid(x @ params["w"] + params["b"]) @ params["out"]
        >>> objective = curvax.Objective(network, curvax.losses.squared_error())
        >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1), "out": jnp.ones((1, 1))}
        >>> batch = (jnp.array([[1.0, -1.0]]), jnp.ones((1, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, params, batch), objective.linearize(params, batch))
        >>> H = curvax.layers.layerwise_curvature(tapped, "hessian")           # exact for one example, block by block
        >>> H.to_dense()[0, 0], curvax.hessian(tapped.point).to_dense()[0, 0]
        (Array(0.0625, dtype=float...), Array(0.0625, dtype=float...))

    Source: Chen et al. 2018, eqs. 5, 6 and 8; Martens and Grosse 2015 for the Fisher matrix.
    """
    check_choice("inputs", inputs, get_args(InputMoments))
    propagated = propagate(tapped, curvature, key)
    factors = propagated.factors(tapped.layers, inputs)
    return with_penalty(kronecker_map(tapped.layers, factors, tapped.point.params), tapped.point)


def block_hessian(tapped: TappedPoint) -> BlockHessian | LinearMap:
    r"""The exact diagonal blocks of the Hessian, one for each weight matrix and each bias, as means over examples.

    (1/N) sum_i h_i h_i^T (x) H_{t,i}, with the recursion run for every example: n_t^2 numbers for each example and
    layer, for study and small batches.

    Raises:
        ValueError: As for ``layerwise_curvature``.

    Example:
        >>> objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"], curvax.losses.squared_error())
        >>> params = {"w": jnp.array([[1.0, -1.0], [2.0, 1.0]]), "u": jnp.array([[1.0], [3.0]])}
        >>> batch = (jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, params, batch), objective.linearize(params, batch))
        >>> H = curvax.hessian(tapped.point)
        >>> blocks = jax.jit(curvax.layers.block_hessian)(tapped)
        >>> bool(jnp.allclose(blocks.to_dense()[2:, 2:], H.to_dense()[2:, 2:], atol=1e-5))      # w
        True

    Source: Chen et al. 2018, eq. 4.
    """
    point = tapped.point
    inputs, curvatures = compiled_if_eager(_exact, point, layers=tapped.layers)
    scale = tapped.example_scales("block_hessian")[0]
    like = trees.Static(trees.structure_of(point.params))
    return with_penalty(BlockHessian(inputs, curvatures, scale, tapped.layers, like), point)


class Propagated(NamedTuple):
    """What a recursion gives, for each of ``layers.treatment.kronecker``.

    Attributes:
        outputs: H_t, (n_t, n_t), the mean curvature with respect to the layer's results: the block of its bias.
        means: m = E[h_{t-1}], (n_{t-1},).
        inputs: h_{t-1} of every example, (examples, n_{t-1}).
        shares: The weights of the examples in means, (examples,); negative ones for "hessian" alone.
    """

    outputs: tuple[Array, ...]
    means: tuple[Array, ...]
    inputs: tuple[Array, ...]
    shares: Array

    @property
    def rows(self) -> tuple[Array, ...]:
        """R with E[h h^T] = R^T R: the inputs times the roots of their weights, which are not to be negative."""
        return tuple(h * jnp.sqrt(self.shares)[:, None].astype(h.dtype) for h in self.inputs)

    def factors(self, layers: Layers, inputs: InputMoments = "second") -> KroneckerFactors:
        """The Kronecker factors of these blocks, whose homogeneous one has no covariance with the inputs."""

        def of_inputs(place, block):
            if inputs == "second":
                moment = _second_moment(self.inputs[place], self.shares)
            else:
                moment = jnp.outer(self.means[place], self.means[place])
            return jnp.pad(moment, (0, 1)).at[-1, -1].set(1) if block.bias is not None else moment

        moments = tuple(of_inputs(i, block)[None] for i, block in enumerate(layers.treatment.kronecker))
        return KroneckerFactors(moments, tuple(h[None] for h in self.outputs), (), (), ())


def propagate(tapped: TappedPoint, curvature: LayerwiseCurvature = "pch1", key: Array | None = None) -> Propagated:
    """The matrices of ``layerwise_curvature``, without a map made from them."""
    check_choice("curvature", curvature, get_args(LayerwiseCurvature))
    return compiled_if_eager(_propagated, tapped.point, key, layers=tapped.layers, curvature=curvature)


def _propagated(point, key, *, layers, curvature):
    tapped = tap(layers, point)
    # Negative weights have a Hessian, but no matrix that is positive semi-definite.
    signed = curvature == "hessian"
    chain = dense_chain(tapped if signed else tapped.definite(), "layerwise_curvature")
    mass = jnp.sum(chain.scale)
    shares = chain.scale / jnp.where(mass == 0, 1, mass)
    inputs = chain.inputs()
    if curvature in ("fisher", "empirical_fisher"):
        chosen = Fisher(num_samples=1) if curvature == "fisher" else EmpiricalFisher()
        outputs = chain.second_moments(chosen, key)
    else:
        outputs = _mean_recursion(chain, shares, curvature)
    means = [_mean(h, shares) for h in inputs]
    return Propagated(chain.by_block(outputs), chain.by_block(means), chain.by_block(inputs), shares)


def _mean_recursion(chain, shares, curvature):
    """H_t of every layer by means over the batch (Chen et al. 2018, eqs. 6 and 8)."""
    last = chain.last_gauss_newton(chain.scale) if curvature == "gauss_newton" else chain.last_hessian(chain.scale)
    # J^T C J is as definite as C.
    definite = chain.piece.loss.convex if curvature == "gauss_newton" else chain.is_convex
    if not definite and curvature != "hessian":
        last = positive_part(last, _clipped if curvature == "gauss_newton" else jnp.abs)
    replace = {"pch1": jnp.abs, "pch2": _clipped, "hessian": lambda entries: entries}.get(curvature)
    if replace is None:
        first, second, gradients = chain.first_derivatives(), None, None
    else:
        (first, second), gradients = chain.derivatives(), chain.gradients()
    weights, found = chain.weights(), [last]
    for t in reversed(range(1, len(chain))):
        curved = (weights[t] @ found[0] @ weights[t].T) * _second_moment(first[t], shares)
        if replace is not None and second is not None and gradients is not None:
            bent = jnp.sum(second[t] * (gradients[t] @ weights[t].T), axis=0)
            curved = curved + jnp.diag(replace(bent))
        curved = chain.in_results(t, curved)
        found.insert(0, (curved + curved.T) / 2)
    return found


def _exact(point, *, layers):
    """(h_{t-1}, H_t) of every example, each by block."""
    chain = dense_chain(tap(layers, point), "block_hessian")
    weights, (first, second) = chain.weights(), chain.derivatives()
    gradients = chain.gradients(scaled=False)
    found = [jnp.moveaxis(chain.last_hessian(jnp.ones_like(chain.scale), by_example=True), 0, 1)]
    for t in reversed(range(1, len(chain))):
        curved = jnp.einsum("io,nop,jp->nij", weights[t], found[0], weights[t]) * _outer(first[t])
        bent = second[t] * (gradients[t] @ weights[t].T)
        found.insert(0, chain.in_results(t, curved + jax.vmap(jnp.diag)(bent)))
    return chain.by_block(chain.inputs()), chain.by_block(found)


def positive_part(matrix: Array, replace: Callable[[Array], Array]) -> Array:
    """Pos-Eig: a symmetric matrix with ``replace`` of its eigenvalues in their place (Chen et al. 2018, eq. 8)."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * replace(values)[None]) @ vectors.T


def _clipped(values):
    return jnp.maximum(values, 0)


def _mean(rows, shares):
    """sum_n w_n h_n."""
    return sum_over_examples("bni,bn->bi", rows[None], shares[None].astype(rows.dtype))[0]


def _second_moment(rows, shares):
    """sum_n w_n h_n h_n^T."""
    return sum_over_examples("bni,bnj->bij", (rows * shares[:, None].astype(rows.dtype))[None], rows[None])[0]


def _outer(rows):
    return rows[:, :, None] * rows[:, None]


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockHessian(LinearMap):
    """The map of ``block_hessian``, without the penalty.

    Attributes:
        inputs: For each block h_{t-1}, (examples, n_{t-1}).
        curvatures: For each block H_t of every example, (examples, n_t, n_t).
    """

    inputs: tuple[Array, ...]
    curvatures: tuple[Array, ...]
    scale: Array
    layers: Layers = dataclasses.field(metadata={"static": True})
    like: trees.Static = dataclasses.field(metadata={"static": True})

    @property
    def structure(self) -> PyTree:
        return self.like.tree

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.structure, "vector", "the map's vectors")

        def on_blocks(matrices):
            blocks = self.layers.treatment.kronecker
            return list(map(self._product, blocks, self.inputs, self.curvatures, matrices))

        return apply_on_blocks(self.layers, (), vector, on_blocks, lambda values: values)

    def _product(self, block, inputs, curvatures, matrix):
        root, scale = root_of(block, matrix.dtype), self.scale.astype(curvatures.dtype)
        if root is not None:
            return root * self._on_matrices(block, inputs, curvatures, scale, (root * matrix)[0])
        return self._on_matrices(block, inputs, curvatures, scale, matrix[0])

    def _on_matrices(self, block, inputs, curvatures, scale, matrix):
        weights, bias = (matrix[:-1], matrix[-1:]) if block.bias is not None else (matrix, None)
        scaled = curvatures * scale[:, None, None]
        curved = inputs.T @ jnp.einsum("nop,np->no", scaled, inputs @ weights)
        if bias is None:
            return curved[None]
        return jnp.concatenate([curved, bias @ jnp.sum(scaled, axis=0)])[None]
