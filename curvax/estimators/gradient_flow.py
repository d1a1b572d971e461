"""How far gradients reach: Jacobians over time and through layers, and what a Newton step makes of weak directions.

Where Jacobians of the far past or of the first layers are small, so is what the gradient says about them (vanishing),
and where they are large, it drowns the rest (exploding): Martens 2016, section 3.1.1. A second-order step divides by
the curvature, which vanishes along with the gradient, and so can boost such directions (section 3.3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.estimators.eigenpairs import Eigenpairs
from curvax.layers.taps import TappedPoint
from curvax.matrices.curvature import example_keys
from curvax.types import Array, PyTree, Scalar


def jacobian_norms_by_lag(step: Callable[[Array, PyTree], Array], state: Array, inputs: PyTree) -> Array:
    r"""The spectral norms ||dh_T / dh_{T-l}|| of a recurrence h_{t+1} = step(h_t, x_t), for the lags l = 0 ... T.

    Below one for long lags the gradient vanishes there, above one it explodes. Products of full Jacobians: for the
    states of one sequence; ``jax.vmap`` over states and inputs takes several.

    Args:
        step: (h, x) -> h, both vectors h of one shape.
        state: h_0, a vector.
        inputs: x_0 ... x_{T-1} along axis 0 of every leaf.

    Returns:
        The norms, of shape (T + 1,); the first is 1.

    Example:
        >>> halve = lambda h, x: h / 2 + x
        >>> curvax.estimators.jacobian_norms_by_lag(halve, jnp.zeros(3), jnp.ones((3, 3))).round(3)
        Array([1.   , 0.5  , 0.25 , 0.125], dtype=float...)
    """
    _, jacobians = jax.lax.scan(lambda h, x: (step(h, x), jax.jacobian(step)(h, x)), state, inputs)

    def back(product, jacobian):
        product = product @ jacobian
        return product, jnp.linalg.norm(product, 2)

    identity = jnp.eye(state.size, dtype=jacobians.dtype)
    _, norms = jax.lax.scan(back, identity, jacobians, reverse=True)
    return jnp.concatenate([jnp.ones(1, norms.dtype), norms[::-1]])


def gradient_norms_by_lag(
    loss: Callable[[Array], Array], step: Callable[[Array, PyTree], Array], state: Array, inputs: PyTree
) -> Array:
    r"""The norms ||dL / dh_{T-l}|| of a loss of the states of a recurrence h_{t+1} = step(h_t, x_t), for the lags l.

    Derivatives are total, by all that a state does later, from one backward sweep at any size. They decay like
    ``jacobian_norms_by_lag`` along the one direction that the loss asks for, where that is of the last state alone.

    Args:
        loss: The states h_0 ... h_T along axis 0 -> a scalar.
        step: (h, x) -> h.
        state: h_0, an array of any shape, as for a batch of sequences.
        inputs: x_0 ... x_{T-1} along axis 0 of every leaf.

    Returns:
        The norms for l = 0 ... T, of shape (T + 1,).

    Example:
        >>> halve = lambda h, x: h / 2 + x
        >>> last = lambda states: jnp.sum(states[-1])
        >>> curvax.estimators.gradient_norms_by_lag(last, halve, jnp.zeros(1), jnp.ones((3, 1))).round(3)
        Array([1.   , 0.5  , 0.25 , 0.125], dtype=float...)
    """
    length = jax.tree.leaves(inputs)[0].shape[0]

    def run(shifts):
        def body(h, given):
            x, shift = given
            h = step(h, x) + shift
            return h, h

        start = state + shifts[0]
        return loss(jnp.concatenate([start[None], jax.lax.scan(body, start, (inputs, shifts[1:]))[1]]))

    gradient = jax.grad(run)(jnp.zeros((length + 1, *state.shape), state.dtype))
    return jnp.linalg.norm(gradient.reshape(length + 1, -1), axis=1)[::-1]


class LayerNorms(NamedTuple):
    """For each layer, by name: the norms of Jacobian and gradient with respect to its outputs."""

    jacobian: dict[str, Array]  # ||dz/ds||_F, the root of its mean square over the examples, estimated
    gradient: dict[str, Array]  # ||dL/ds||, likewise, exact


def layer_norms(tapped: TappedPoint, key: Array, *, num_samples: int = 1) -> LayerNorms:
    r"""How strongly the outputs of the model, and its loss, depend on the outputs of every layer.

    The squared Frobenius norm of dz_i/ds_i is the mean of ||(dz_i/ds_i)^T v||^2 over signs v, one backward pass for
    each draw; the mean over examples is taken of both squares. Positions that share parameters within an example, such
    as the steps of a recurrence, count together.

    Args:
        num_samples: Draws of v for each example.

    Example:
        >>> objective = curvax.Objective(lambda p, x: (x @ p["a"]) @ p["b"], curvax.losses.squared_error())
        >>> params, batch = {"a": jnp.eye(2), "b": jnp.full((2, 1), 0.1)}, (jnp.ones((3, 2)), jnp.zeros((3, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, params, batch), objective.linearize(params, batch))
        >>> norms = curvax.estimators.layer_norms(tapped, jax.random.key(0))
        >>> [f"{float(norms.jacobian[name]):.3f} {float(norms.gradient[name]):.3f}" for name in ("a", "b")]
        ['0.141 0.028', '1.000 0.200']
    """
    tapped.check_separate("layer_norms")
    pieces = tapped.point.pieces()

    def squares(cotangents):
        found = {}
        for name, uses in tapped.by_layer(tapped.pull_back(cotangents)).items():
            count = sum(tapped.point.num_examples(term) for term in {use.term for use in uses})
            found[name] = sum(jnp.sum(jnp.square(use.cotangents)) for use in uses) / count
        return found

    def noise(piece, keys):
        example = trees.example_structure(piece.outputs)
        return jax.vmap(lambda k: trees.random_rademacher(k, example))(keys)

    def one(key):
        keys = example_keys(tapped.point, key)
        return squares(tuple(noise(piece, own) for piece, own in zip(pieces, keys, strict=True)))

    draws = jax.lax.map(one, trees.split_key(key, num_samples))
    jacobian = {name: jnp.sqrt(jnp.mean(draw)) for name, draw in draws.items()}
    return LayerNorms(jacobian, jax.tree.map(jnp.sqrt, squares(tapped.loss_cotangents())))


class Boosts(NamedTuple):
    """Along each eigenvector d of a curvature matrix, with eigenvalue lambda_d."""

    gradient: Array  # d^T g
    newton: Array  # d^T g / (lambda_d + damping), minus the step along d
    boost: Array  # the second over the first, relative to the direction of most curvature that is given


def newton_boosts(pairs: Eigenpairs, gradient: PyTree, *, damping: Scalar = 0.0) -> Boosts:
    r"""How much more a Newton step makes of each eigendirection of B than a gradient step does.

    Directions that the loss depends on by the distant past only have small gradients and small curvature; the step
    divides by the latter, and boosts them, unless contributions to the gradient cancel (Martens 2016, section 3.3.1).
    Given the part of the gradient from long lags and that from short ones in turn, it shows which of the two a
    direction is for.

    Args:
        pairs: From ``curvax.estimators.top_eigenpairs`` of B, at either end of its spectrum.
        damping: lambda of the step.

    Example:
        >>> B = curvax.Diagonal(jnp.array([100.0, 4.0, 1.0]))
        >>> pairs = curvax.estimators.top_eigenpairs(B, jax.random.key(0), num_pairs=3)
        >>> curvax.estimators.newton_boosts(pairs, jnp.array([1.0, 1.0, 0.1])).boost.round(2)
        Array([  1.,  25., 100.], dtype=float...)
    """
    along = jax.vmap(lambda d: trees.vdot(d, gradient))(pairs.vectors)
    damped = pairs.values + jnp.asarray(damping, pairs.values.dtype)
    return Boosts(along, along / damped.astype(along.dtype), jnp.max(damped) / damped)
