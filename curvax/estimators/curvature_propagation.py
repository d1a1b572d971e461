r"""Curvature propagation: random rank-one estimates of a whole Hessian or Gauss-Newton matrix by backward sweeps.

The Hessian of a composed function is a sum over its operations n of J_n^T M_n J_n, where J_n is the Jacobian of the
operation's operands in the parameters and M_n its own second derivative, contracted with the loss's derivative at its
result. With M_n = P_n^T Q_n and independent noise v_n of covariance I, the sweeps

    s = sum_n J_n^T P_n^T v_n,    t = sum_n J_n^T Q_n^T v_n

have E[s t^T] = H, at the cost of a backward pass each: noise is added wherever the program bends.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.layers.diagonals import products, with_penalty
from curvax.layers.per_example import used_once
from curvax.layers.taps import TappedPoint
from curvax.objectives.penalty import Penalty
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import scale_cases
from curvax.programs.linearize import linearize
from curvax.programs.record import Step, found, pull_back, record_term
from curvax.types import Array, PyTree


def propagate_curvature(at: CurvaturePoint, key: Array) -> tuple[PyTree, PyTree]:
    r"""Two random vectors s, t with E[s t^T] = H, the Hessian of the objective, penalty included.

    Noise is of signs, and independent at every operation and every example, so one draw is unbiased for the whole
    batch. ``s * t`` estimates the diagonal, ``s (t^T v)`` a product, and means over keys improve them; the paper finds
    the variance below that of (H v) v^T. For the Gauss-Newton matrix ``curvax.ggn(...).sample(key)`` is one vector u
    that serves as both. A ``scan`` is unrolled while tracing. Source: Martens, Sutskever and Swersky 2012; Martens
    2016, sections 3.4.4 and 4.9.4.

    Example:
        >>> objective = curvax.Objective(lambda w, x: w**3 * x, curvax.losses.squared_error())
        >>> batch = (jnp.array([[1.0, 3.0]]), jnp.ones((1, 2)))
        >>> at = objective.linearize(jnp.ones(2), batch)             # H = diag(9 x^2 + 6 x (x - 1))
        >>> keys = jax.random.split(jax.random.key(0), 1000)
        >>> s, t = jax.vmap(lambda k: curvax.estimators.propagate_curvature(at, k))(keys)
        >>> bool(jnp.allclose(jnp.mean(s * t, axis=0), jnp.array([9.0, 117.0]), rtol=0.1))
        True
    """
    _check_losses(at)
    keys = jax.random.split(key, len(at.terms) + 1)
    left = right = trees.zeros_like(at.params)
    terms = zip(at.terms, at.cases, at.pieces(), keys[:-1], strict=True)
    for term, cases, piece, term_key in terms:
        recorded = record_term(term, at.params, cases.inputs)
        scaled = scale_cases(cases.scale, piece.loss.gradient(piece.outputs, piece.targets))
        sides = _propagate(recorded, piece, scaled, cases.scale, term_key)
        left, right = (
            trees.add(total, recorded.to_params(arrived, total))
            for total, arrived in zip((left, right), sides, strict=True)
        )
    if at.penalty:
        weights = at.penalty.curvature(at.params)
        noise = trees.multiply(trees.random_rademacher(keys[-1], at.params), _root(weights))
        left = trees.add(left, noise)
        right = trees.add(right, trees.multiply(noise, jax.tree.map(jnp.sign, weights)))
    return left, right


def sampled_hessian_diagonal(tapped: TappedPoint, key: Array, *, num_samples: int = 1) -> PyTree:
    r"""An unbiased estimate of the diagonal of the Hessian by curvature propagation, the mean of s_i * t_i by examples.

    Products are taken for each example and in the inputs and cotangents of its layers, so the variance falls with the
    number of examples, for two backward sweeps and the gradient's. Parameters without structure, those used more than
    once and those under ``scan`` are estimated as by ``propagate_curvature``, from the sums over the examples. Source:
    Martens, Sutskever and Swersky 2012; the products by layers as in Martens 2016, section 4.9.3.

    Raises:
        ValueError: The model couples examples, or weights or a mask over the steps of sequences make the cases finer
            than examples.

    Example:
        >>> objective = curvax.Objective(lambda w, x: jnp.tanh(x @ w), curvax.losses.squared_error())
        >>> w, batch = jnp.full((2, 1), 0.5), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> estimate = curvax.estimators.sampled_hessian_diagonal(tapped, jax.random.key(0), num_samples=300)
        >>> exact = curvax.hessian(tapped.point).diagonal()
        >>> bool(jnp.allclose(estimate, exact, rtol=0.2))
        True
    """
    scales = tapped.example_scales("sampled_hessian_diagonal")

    _check_losses(tapped.point)

    def one(total, key):
        return trees.add(total, _layer_products(tapped, scales, key)), None

    zeros = trees.widened(trees.zeros_like(tapped.point.params))
    total, _ = jax.lax.scan(one, zeros, trees.split_key(key, num_samples))
    return with_penalty(tapped.point, trees.scale(1 / num_samples, total))


def _layer_products(tapped, scales, key):
    """One draw of sum_i scale_i s_i * t_i, without the penalty."""
    point = tapped.point
    whole_key, *keys = jax.random.split(key, len(point.terms) + 1)
    once = {(layer.members[0].term, layer.members[0].use): layer for layer in used_once(tapped.layers)}
    single = {place: layer for place, layer in once.items() if _is_plain(tapped, *place)}
    raw = ([], [])
    for index, (term, cases, piece) in enumerate(zip(point.terms, point.cases, point.pieces(), strict=True)):
        uses = [geometry.use for geometry in tapped.taps[index].uses]
        roots = [use.address for i, use in enumerate(uses) if (index, i) in single]
        recorded = record_term(term, point.params, cases.inputs, roots)
        # The scales come in at the end; cases that are left out may not be finite and stay out from the start.
        present = (cases.scale != 0).astype(cases.scale.dtype)
        gradient = scale_cases(present, piece.loss.gradient(piece.outputs, piece.targets))
        pair = _propagate(recorded, piece, gradient, present, keys[index])
        for side, arrived in zip(raw, pair, strict=True):
            side.append(
                [
                    found(arrived, recorded.program.roots[use.address]) if (index, i) in single else use.zeros()
                    for i, use in enumerate(uses)
                ]
            )
    left, right = (tapped.capture(side) for side in raw)
    estimate = products(tapped, left, right, scales)
    done = {leaf for layer in single.values() for leaf in layer.leaves}
    left_alone = tapped.layers.unstructured if tapped.layers.fallback == "gradient" else ()
    others = [i for i in range(len(tapped.layers.paths)) if i not in done and i not in left_alone]
    if not others:
        return estimate
    s, t = propagate_curvature(dataclasses.replace(point, penalty=Penalty()), whole_key)
    return trees.replace_leaves(estimate, others, trees.multiply(trees.widened(s), t))


def _check_losses(point):
    if not all(term.loss.has_value for term in point.terms):
        raise ValueError("the Hessian needs the loss, and this objective has curvature only; see curvax.ggn")


def _propagate(recorded, piece, gradient, scale, key):
    """The two sweeps: what arrives at every value of the program."""
    program = recorded.program
    cotangents = program.sweep(recorded.at_outputs(gradient), pull_back)
    keys = jax.random.split(key, len(program.steps) + 1)
    sides = tuple(map(recorded.at_outputs, _loss_noise(piece, scale, keys[-1])))
    for step, step_key in zip(program.steps, keys[:-1], strict=True):
        if not step.linear and any(id(out) in cotangents for out in step.outputs):
            at_results = [found(cotangents, out) for out in step.moving]
            for side, noise in zip(sides, _noise(step, at_results, step_key), strict=True):
                side += zip(step.variables, noise, strict=True)
    return tuple(program.sweep(side, pull_back) for side in sides)


def _loss_noise(piece, scale, key):
    """P^T v and Q^T v of the loss: its root where it is convex, otherwise v and H_L v."""
    matrix = piece.loss.hessian(piece.outputs, piece.targets)
    if piece.loss.convex:
        root = matrix.sqrt_transpose_product(trees.random_rademacher(key, matrix.root_structure))
        left = scale_cases(_root(scale), root)
        return left, scale_cases(jnp.sign(scale), left)
    signs = trees.random_rademacher(key, piece.outputs)
    return signs, scale_cases(scale, matrix.product(signs))


def _root(weights):
    """Roots of the sizes of weights, which may be negative."""
    return jax.tree.map(lambda w: jnp.sqrt(jnp.abs(w)), weights)


def _noise(step: Step, cotangents: list[Array], key: Array) -> tuple[list[Array], list[Array]]:
    """P^T v and Q^T v of one operation, whose own second derivative is M = P^T Q."""
    arrays = [x.array for x in step.variables]

    def bend(*vectors):
        """M v."""
        return linearize(lambda *xs: jax.vjp(step.function, *xs)[1](cotangents), *arrays).jvp(*vectors)

    signs = [trees.random_rademacher(k, x) for k, x in zip(jax.random.split(key, len(arrays)), arrays, strict=True)]
    if step.elementwise and len(arrays) == 1:
        (diagonal,) = bend(jnp.ones_like(arrays[0]))
        root = jnp.sqrt(jnp.abs(diagonal))
        return [root * signs[0]], [jnp.sign(diagonal) * root * signs[0]]
    # M grows with the cotangent: half of it on either side keeps the two sweeps of one size.
    size = sum(jnp.sum(jnp.square(c)) for c in cotangents) / sum(c.size for c in cotangents)
    alike = step.elementwise and all(x.shape == cotangents[0].shape for x in arrays)
    balance = jnp.sqrt(jnp.abs(cotangents[0])) if alike else jnp.sqrt(jnp.sqrt(size))
    balance = jnp.where(balance > 0, balance, 1)
    return [v * balance.astype(v.dtype) for v in signs], [x / balance.astype(x.dtype) for x in bend(*signs)]


def _is_plain(tapped, term, place):
    use = tapped.taps[term].uses[place].use
    return not use.scans and use.side is not None
