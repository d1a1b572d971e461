"""EA-CG: steps by layer-wise curvature from recursions, such as the positive-curvature Hessian (Chen et al. 2018)."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
import optax

from curvax import trees
from curvax.checks import check_choice
from curvax.damping.rules import DampingRule, next_batch_rule
from curvax.layers.find import Layers
from curvax.layers.kronecker import apply_on_blocks, to_block
from curvax.layers.layerwise_solvers import EACG, KFI, Damped, KroneckerCG, LayerSystem, LayerwiseSolver, Limits
from curvax.layers.recursions import LayerwiseCurvature, propagate
from curvax.layers.taps import tap
from curvax.transforms._judge import NextBatch, begun
from curvax.transforms._step import Given, Step, check_arguments, stepper
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
    learning_rate: optax.ScalarOrSchedule = 1.0,
    max_iterations: optax.ScalarOrSchedule = 20,
    tolerance: optax.ScalarOrSchedule = 1e-2,
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

    ``update`` takes ``at=`` and optionally ``curvature_at=``, a point on another batch for C.

    Args:
        layers: From ``curvax.find_layers``.
        curvature: "pch1" or "pch2", "gauss_newton", "fisher" or "empirical_fisher"; see
            ``curvax.layers.layerwise_curvature``.
        solver: "ea_cg"; "kronecker_cg", conjugate gradients with E[h h^T] in the place of E[h] E[h]^T; "kfi",
            Kronecker-factored inverses of the damped factors; or a value that holds more choices, such as
            ``curvax.layers.KFI("rank_one")``.
        alpha: Between 0 and 1, a number or a schedule; None lets it adapt.
        initial_alpha: What adapting begins with; if None, from the curvature along the first gradient.
        rule: How lambda adapts, ``curvax.damping.next_batch_rule(period=1, base=0.9)`` if None.
        learning_rate: eta.
        max_iterations: The most iterations on each layer.
        tolerance: The relative residual at which a layer stops.
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
    if alpha is not None and not (initial_alpha is None and rule is None):
        raise ValueError("ea_cg: alpha= is one that stays; initial_alpha= and rule= are for one that adapts")
    judge = None
    if alpha is None:
        rule = next_batch_rule(period=1, base=0.9) if rule is None else rule
        judge = NextBatch(rule, rule)

    def step(given: Given) -> Step:
        if alpha is not None:
            kept = strength = _odds(given.number(alpha))
        elif initial_alpha is not None:
            kept = strength = given.strength
        else:
            kept, strength = begun(given.strength, lambda: solve.curvature_along_gradient(given))
        solution, figures = solve(given, strength)
        rate = given.number(learning_rate)
        # x is orthogonal to the residual that a truncated solve leaves, so x^T A x = g^T x.
        slope = trees.vdot(given.gradient, solution).astype(given.dtype)
        figures |= {"predicted_change": -rate * slope + rate**2 * slope / 2, "step_ratio": given.info.step_ratio}
        update = trees.scale(-rate, solution)
        if judge is None:
            return Step(update, figures)
        finite = trees.all_finite(given.at.loss, slope)
        return Step(update, figures | {"loss": given.at.loss}, strength=kept, finite=finite)

    return stepper(
        "ea_cg",
        step,
        strength=0.0 if initial_alpha is None else _odds(initial_alpha),
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

    def step(given: Given) -> Step:
        solution, figures = solve(given, _odds(given.number(alpha)))
        return Step(solution, figures)

    points = ("at", "curvature_at")
    return stepper("scale_by_ea_cg", step, seed=seed, extra={"alpha": None}, points=points)


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

    def __call__(self, given: Given, strength: Array) -> tuple[PyTree, dict[str, Array]]:
        """The solution and figures, for lambda = alpha / (1 - alpha)."""
        alpha = strength / (1 + strength)
        share = 1 - alpha
        damping = alpha + share * given.largest_penalty
        limits = Limits(jnp.asarray(given.number(self.max_iterations)).astype(jnp.int32), given.number(self.tolerance))
        gradient = trees.embed(given.gradient, given.at.params)
        solved = self.solver.solve(self._systems(given, gradient), Damped(share, damping), limits)
        matrices = [_joined(*layer) for layer in solved.layers]
        whole = apply_on_blocks(self.layers, (), gradient, lambda _: matrices, lambda zero: zero + 1 / damping)
        figures = {"damping": strength, "alpha": alpha, "inner_iterations": solved.iterations}
        return trees.extract(whole, given.gradient), figures

    def curvature_along_gradient(self, given: Given) -> Array:
        """g^T C g / g^T g: with it as lambda no step is longer than steepest descent's to the minimum of the model."""
        curved, total = jnp.zeros((), given.dtype), jnp.zeros((), given.dtype)
        for system in self._systems(given, trees.embed(given.gradient, given.at.params)):
            along = system.mean @ system.weights
            sides = [(along @ system.curvature @ along, system.weights)]
            if system.bias is not None:
                sides.append((system.bias @ system.bias_curvature @ system.bias, system.bias))
            curved = curved + sum(form.astype(given.dtype) for form, _ in sides)
            total = total + sum(jnp.sum(jnp.square(g)).astype(given.dtype) for _, g in sides)
        return curved / jnp.where(total > 0, total, 1)

    def _systems(self, given, gradient):
        """The curvature of each layer with its part of the gradient."""
        at = given.curvature_at.subset(1)  # a point in chunks is taken whole: means need all examples at once
        seconds = self.solver.reads_seconds
        propagated = propagate(tap(self.layers, at), self.curvature, given.key, seconds=seconds)
        blocks = self.layers.treatment.kronecker
        parts = zip(
            blocks, propagated.outputs, propagated.means, propagated.seconds or [None] * len(blocks), strict=True
        )
        return [_system(block, h, m, a, to_block(block, gradient)[0].astype(h.dtype)) for block, h, m, a in parts]


def _system(block, curvature, mean, second, matrix):
    """A layer's system, in the orthonormal coordinates of the parameters where these are scaled before their use."""
    weights, bias = (matrix[:-1], matrix[-1]) if block.bias is not None else (matrix, None)
    bias_size = jnp.ones((), matrix.dtype)
    if block.roots is not None:
        inputs, outputs = (jnp.asarray(root[0], matrix.dtype) for root in block.roots)
        curvature, bias_size = curvature * jnp.outer(outputs, outputs), jnp.square(inputs[-1])
        inputs = inputs[: len(mean)]
        mean, second = inputs * mean, None if second is None else second * jnp.outer(inputs, inputs)
    return LayerSystem(curvature, mean, second, weights, bias, bias_size)


def _joined(weights, bias):
    """The matrices of a block."""
    return (weights if bias is None else jnp.concatenate([weights, bias[None]]))[None]


def _odds(alpha):
    """lambda = alpha / (1 - alpha)."""
    return alpha / (1 - alpha)
