"""EA-CG: steps by layer-wise curvature from recursions, such as the positive-curvature Hessian (Chen et al. 2018)."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
import optax

from curvax import trees
from curvax.checks import check_choice
from curvax.damping.rules import DampingRule, kfac_rule, next_batch_rule
from curvax.layers.find import Layers
from curvax.layers.kronecker import apply_on_blocks, to_block
from curvax.layers.layerwise_solvers import EACG, KFI, Damped, KroneckerCG, LayerSystem, LayerwiseSolver, Limits
from curvax.layers.recursions import LayerwiseCurvature, propagate
from curvax.layers.taps import tap
from curvax.layers.use import replicated
from curvax.matrices.curvature import GaussNewton
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._arguments import check_arguments, part_of
from curvax.transforms._judge import JudgedBy, begun, judged_here, judging
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array, PyTree

SolverName = Literal["ea_cg", "kronecker_cg", "kfi"]
_SOLVERS = {"ea_cg": EACG, "kronecker_cg": KroneckerCG, "kfi": KFI}


def ea_cg(
    layers: Layers,
    *,
    curvature: LayerwiseCurvature = "pch1",
    solver: SolverName | LayerwiseSolver = "ea_cg",
    alpha: optax.ScalarOrSchedule | None = None,
    initial_alpha: float | None = None,
    rule: DampingRule | None = None,
    judged_by: JudgedBy = "next_batch",
    learning_rate: optax.ScalarOrSchedule | None = None,
    max_iterations: optax.ScalarOrSchedule = 20,
    tolerance: optax.ScalarOrSchedule = 1e-2,
    curvature_stride: int | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""EA-CG: delta = -eta ((1 - alpha) C + alpha I)^{-1} g, with C from a recursion along the layers.

    C has a block E[h] E[h]^T (x) H_t for the weights of each layer and H_t for its bias; H_t, by default the
    positive-curvature Hessian, follows from that of the next layer. For chains of dense layers with elementwise
    activations; other models are refused, with the operation that stands in the way. Nothing but alpha is carried from
    step to step.

    alpha adapts unless it is given: what the step does to the loss of the next batch says how lambda, with alpha =
    lambda / (1 + lambda), goes on, and a step that raises that far beyond what noise explains is undone and counted in
    ``undone_steps``. The paper has ``alpha`` fixed, from 0.01 to 0.1, with ``learning_rate`` from 0.05 to 0.2: nothing
    is then undone, and as the weights have curvature along E[h] alone, alpha is a learning rate for all the rest.

    The penalty of the objective is added to C, by the largest of its strengths where leaves differ. ``update`` takes
    ``at=`` and optionally ``curvature_at=``, a point on another batch for C.

    Args:
        layers: From ``curvax.find_layers``.
        curvature: "pch1" or "pch2", "gauss_newton", "fisher" or "empirical_fisher"; see
            ``curvax.layers.layerwise_curvature``.
        solver: "ea_cg"; "kronecker_cg", conjugate gradients with E[h h^T] in the place of E[h] E[h]^T; "kfi",
            Kronecker-factored inverses of the damped factors; or a value that holds more choices, such as
            ``curvax.layers.KFI("rank_one")``.
        alpha: Between 0 and 1, a number or a schedule; None lets it adapt.
        initial_alpha: What adapting begins with; if None, lambda_0 is the geometric mean over the layers of their mean
            curvatures, the trace of C over its size.
        rule: How lambda adapts; if None ``curvax.damping.next_batch_rule()``, or ``kfac_rule()`` by the "same_batch".
        judged_by: "next_batch", or "same_batch" for the batch that the step comes from.
        learning_rate: eta, a number or a schedule; None for the best one by the exact Gauss-Newton matrix, or a
            shorter one where that promises more than the whole loss; also the most that is taken where alpha adapts.
        max_iterations: The most iterations on each layer.
        tolerance: The relative residual at which a layer stops.
        curvature_stride: Every so many-th example is for that exact matrix; if None, so that some 250 or more are, but
            no more than every fourth; of a point in chunks of fewer than 250 all, chunk by chunk.
        seed: Seed of what "fisher" draws.

    Returns:
        The transformation; ``state.info.extra`` has ``alpha``, and ``inner_iterations`` are the most of any layer.

    Raises:
        ValueError: The layers are no chain of dense ones.

    Example:
        >>> def network(params, x):
        ...     return jax.nn.sigmoid(x @ params["w"] + params["b"]) @ params["out"]
        >>> objective = curvax.Objective(network, curvax.losses.squared_error())
        >>> params = {"w": jnp.eye(2), "b": jnp.zeros(2), "out": jnp.ones((2, 1))}
        >>> batch = (jnp.array([[1.0, -1.0], [0.5, 2.0]]), jnp.ones((2, 1)))
        >>> tx = curvax.ea_cg(curvax.find_layers(objective, params, batch))
        >>> loss, grads, at = objective.value_and_grad(params, batch)
        >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params, at=at)
        >>> bool(objective(optax.apply_updates(params, updates), batch) < loss)
        True

    Source: Chen, Hsu, Gonzalez Pardo and Chou 2018, eqs. 8 to 11.
    """
    check_arguments(ea_cg, locals())
    solve = _Solve("ea_cg", layers, curvature, solver, max_iterations, tolerance)
    _check_alpha("ea_cg", alpha=alpha, initial_alpha=initial_alpha)
    if alpha is not None and not (initial_alpha is None and rule is None):
        raise ValueError("ea_cg: alpha= is one that stays; initial_alpha= and rule= are for one that adapts")
    own, judge = judging(judged_by, rule, kfac_rule(), next_batch_rule(), damped=True)
    judge = judge if alpha is None else None

    def step(given: Given) -> Step:
        systems = solve.systems(given)
        if alpha is not None:
            kept = strength = _odds(given.number(alpha))
        elif initial_alpha is not None:
            kept = strength = given.strength
        else:
            kept, strength = begun(given.strength, lambda: _mean_curvature(systems))
        solution, figures = solve(given, systems, strength)
        rate = None if learning_rate is None else given.number(learning_rate)
        if rate is None or alpha is None:
            # C has no curvature orthogonal to E[h], so that it would promise many times what there is.
            stride, at = curvature_stride, given.curvature_at
            part = part_of("ea_cg", "curvature_stride", stride, at, given.steps, most=4, least=250)
            exact = GaussNewton().at(part).restrict(given.gradient)
            slope, length = trees.vdot(given.gradient, solution), trees.norm(solution).astype(given.dtype)
            slope = slope.astype(given.dtype)
            bend = exact.quadratic(solution).astype(given.dtype) + strength * jnp.square(length)
            best = _best_rate(slope, bend, given.at)
            rate = best if rate is None else jnp.minimum(rate, best)
            figures |= {"predicted_change": -rate * slope + rate**2 * bend / 2, "step_size": rate}
        update = trees.scale(-rate, solution)
        if alpha is not None:
            return Step(update, figures, finite=jnp.isfinite(strength))
        loss, predicted = given.at.loss.astype(given.dtype), figures["predicted_change"]
        figures |= {"loss": loss, "step_ratio": given.info.step_ratio}
        if judge is None:
            figures["step_ratio"], adapted = judged_here(own, given, strength, update, loss, predicted)
            kept = adapted if initial_alpha is not None else jnp.where(kept > 0, adapted, kept)
        finite = trees.all_finite(loss, predicted)
        return Step(update, figures, strength=kept, finite=finite)

    return stepper(
        "ea_cg",
        step,
        strength=0.0 if initial_alpha is None else initial_alpha / (1 - initial_alpha),
        seed=seed,
        extra={"alpha": None},
        points=("at", "curvature_at"),
        judge=judge,
    )


def scale_by_ea_cg(
    layers: Layers,
    *,
    curvature: LayerwiseCurvature = "pch1",
    solver: SolverName | LayerwiseSolver = "ea_cg",
    alpha: optax.ScalarOrSchedule = 0.05,
    max_iterations: optax.ScalarOrSchedule = 20,
    tolerance: optax.ScalarOrSchedule = 1e-2,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by ((1 - alpha) C + alpha I)^{-1}, with C from a recursion along the layers.

    It preconditions whatever updates arrive and reads no step of its own; chain momentum and a learning rate behind it.
    Arguments are those of ``curvax.ea_cg``, with an alpha that stays.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((1, 1)), (jnp.ones((2, 1)), jnp.ones((2, 1)))
        >>> tx = curvax.scale_by_ea_cg(curvax.find_layers(objective, w, batch), alpha=0.5)
        >>> jax.jit(tx.update)(jnp.ones((1, 1)), tx.init(w), w, at=objective.linearize(w, batch))[0]
        Array([[1.]], dtype=float...)

    Source: Chen, Hsu, Gonzalez Pardo and Chou 2018, eqs. 8 to 11.
    """
    check_arguments(scale_by_ea_cg, locals())
    solve = _Solve("scale_by_ea_cg", layers, curvature, solver, max_iterations, tolerance)
    _check_alpha("scale_by_ea_cg", alpha=alpha)

    def step(given: Given) -> Step:
        strength = _odds(given.number(alpha))
        solution, figures = solve(given, solve.systems(given), strength)
        return Step(solution, figures, finite=jnp.isfinite(strength))

    points = ("at", "curvature_at")
    return stepper("scale_by_ea_cg", step, seed=seed, extra={"alpha": None}, points=points)


def _best_rate(slope: Array, bend: Array, at: CurvaturePoint) -> Array:
    """Where -eta s + eta^2 b / 2 is least; before it says more than all of a loss that is not below zero would go."""
    best = jnp.where(bend > 0, slope / jnp.where(bend > 0, bend, 1), 0)
    bounded = at.loss_is_nonnegative
    if bounded is False:  # there need not be a value
        return best
    promised = best * slope / 2
    share = jnp.abs(at.loss).astype(promised.dtype) / jnp.where(promised > 0, promised, 1)
    # 1 - sqrt(1 - share) without cancellation.
    return jnp.where(bounded & (share < 1), best * share / (1 + jnp.sqrt(jnp.maximum(1 - share, 0))), best)


class _Solve:
    """((1 - alpha) C + alpha I)^{-1} g, which both transformations have in common."""

    def __init__(self, name, layers, curvature, solver, max_iterations, tolerance):
        if not isinstance(layers, Layers):
            raise TypeError(
                f"{name}: the first argument is curvax.find_layers(objective, params, batch), got {layers!r}"
            )
        check_choice(f"{name}: curvature", curvature, [c for c in get_args(LayerwiseCurvature) if c != "hessian"])
        if not isinstance(solver, LayerwiseSolver):
            check_choice(f"{name}: solver", solver, _SOLVERS)
            solver = _SOLVERS[solver]()
        self.layers, self.curvature, self.solver = layers, curvature, solver
        self.max_iterations, self.tolerance = max_iterations, tolerance

    def systems(self, given: Given) -> list[LayerSystem]:
        """The curvature of each layer with its part of the gradient."""
        at = given.curvature_at.subset(1)  # a point in chunks is taken whole: means need all examples at once
        propagated = propagate(tap(self.layers, at), self.curvature, given.key)
        blocks, gradient = self.layers.treatment.kronecker, trees.embed(given.gradient, given.at.params)
        parts = zip(blocks, propagated.outputs, propagated.means, propagated.rows, strict=True)
        return [_system(block, h, m, rows, to_block(block, gradient)[0].astype(h.dtype)) for block, h, m, rows in parts]

    def __call__(self, given: Given, systems: list[LayerSystem], strength: Array) -> tuple[PyTree, dict[str, Array]]:
        """The solution and figures, for lambda = alpha / (1 - alpha)."""
        share = 1 / (1 + strength)  # not 1 - alpha, which is nothing for large lambda
        alpha = strength * share
        damping = alpha + share * given.largest_penalty
        limits = Limits(jnp.asarray(given.number(self.max_iterations)).astype(jnp.int32), given.number(self.tolerance))
        solved = self.solver.solve(systems, Damped(share, damping), limits)
        matrices = [_joined(*layer) for layer in solved.layers]
        gradient = trees.embed(given.gradient, given.at.params)
        whole = apply_on_blocks(self.layers, (), gradient, lambda _: matrices, lambda zero: zero + 1 / damping)
        figures = {"damping": strength, "alpha": alpha, "inner_iterations": solved.iterations}
        return trees.extract(whole, given.gradient), figures


def _mean_curvature(systems):
    """The geometric mean over the layers of the mean curvature of each, which follows the scale of the loss.

    Layers differ by many powers of ten: of all parameters nearly all are in the first layer, which has next to no
    curvature, and of all curvature nearly all is in the last.
    """
    means = []
    for system in systems:
        trace, size = jnp.trace(system.curvature), jnp.sum(jnp.square(system.mean))
        if system.bias is None:
            means.append(size * trace / system.weights.size)
        else:
            means.append((size + system.bias_size) * trace / (system.weights.size + system.bias.size))
    each = jnp.stack(means)
    some = each > 0  # a layer that no example wakes says nothing
    logarithm = jnp.mean(jnp.log(jnp.where(some, each, 1)), where=some)
    return jnp.where(jnp.any(some), jnp.exp(logarithm), 0)


def _system(block, curvature, mean, rows, matrix):
    """A layer's system, in the orthonormal coordinates of the parameters where these are scaled before their use."""
    weights, bias = (matrix[:-1], matrix[-1]) if block.bias is not None else (matrix, None)
    bias_size, rows = jnp.ones((), matrix.dtype), replicated(rows)
    if block.roots is not None:
        inputs, outputs = (jnp.asarray(root[0], matrix.dtype) for root in block.roots)
        curvature, bias_size = curvature * jnp.outer(outputs, outputs), jnp.square(inputs[-1])
        inputs = inputs[: len(mean)]
        mean, rows = inputs * mean, inputs[None] * rows
    return LayerSystem(curvature, mean, rows, weights, bias, bias_size)


def _joined(weights, bias):
    """The matrices of a block."""
    return (weights if bias is None else jnp.concatenate([weights, bias[None]]))[None]


def _check_alpha(name, **numbers):
    """Raises a ValueError for a number that is known and not between 0 and 1."""
    for argument, alpha in numbers.items():
        known = isinstance(alpha, (int, float, np.ndarray, np.generic))
        if known and not 0 < float(alpha) < 1:
            raise ValueError(f"{name}: {argument}= must lie between 0 and 1, got {alpha!r}")


def _odds(alpha):
    """lambda = alpha / (1 - alpha); not a number, so that the step is skipped, where alpha is not between 0 and 1."""
    inside = (alpha > 0) & (alpha < 1)
    return jnp.where(inside, alpha / jnp.where(inside, 1 - alpha, 1), jnp.nan)
