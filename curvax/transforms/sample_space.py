"""Gauss-Newton steps solved in the space of the samples: natural gradient for fewer outputs than parameters."""

from __future__ import annotations

from typing import Literal

import optax

from curvax import trees
from curvax.layers.find import Layers, find_layers_at
from curvax.layers.sample_space import SampleSpace
from curvax.layers.taps import tap
from curvax.matrices.curvature import GaussNewton, OutputCurvature, check_curvature
from curvax.transforms._arguments import check_arguments
from curvax.transforms._step import Given, Step, nothing, stepper


def scale_by_sample_space(
    layers: Layers | None = None,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    momentum: optax.ScalarOrSchedule | None = None,
    centered: bool = False,
    curvature: OutputCurvature | None = None,
    method: Literal["auto", "cholesky", "cg"] = "auto",
    max_iterations: int = 40,
    tolerance: optax.ScalarOrSchedule = 1e-6,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by (G + lambda I)^{-1}, solved in the space of the samples.

    With R the rows of scaled output gradients, G = R^T R and (G + lambda I)^{-1} g = (g - R^T (R R^T + lambda I)^{-1}
    R g) / lambda: a system of the size of the batch times the outputs, whatever the number of parameters. R R^T comes
    from the inputs and output cotangents of the layers. This is the solve of Gauss-Newton for physics-informed networks
    and, ``centered``, of minSR (Chen and Heyl 2024); with ``momentum`` mu it is SPRING's (Goldshlager, Abrahamsen and
    Lin 2024), delta_k = mu delta_{k-1} + (G + lambda I)^{-1} (g - mu G delta_{k-1}), the damped solution nearest to mu
    times the last one.

    For variational Monte Carlo the model gives logarithms of amplitudes, real or complex, for
    ``curvax.losses.curvature_only(curvax.losses.squared_error())``. Centred, G is then the quantum geometric tensor
    S = Re (<O^* O> - <O^*><O>) with O the derivatives of the logarithm, and the gradient of the energy comes from the
    local energies E_i as ``at.jacobian_transpose_product(2 (E - mean(E)) / N)``. Where configurations have weights
    w_i, N times the probability of each where all are summed over, it is 2 w (E - mean(w E)) / N.

    It preconditions whatever updates arrive and reads no loss value; chain a learning rate behind it. ``update`` takes
    ``at=``. Parameters without structure keep their updates with ``fallback="gradient"``, and are divided by the
    diagonal of G + lambda I with ``fallback="diagonal"``.

    Args:
        layers: From ``curvax.find_layers``, with the fallback of your choice; None to find them at the first update,
            where a parameter without structure is an error.
        damping: lambda, above 0, a number or a schedule.
        momentum: mu, in [0, 1), a number or a schedule; None for none.
        centered: Take the mean over the batch, weighted as the examples are, off the rows of R: off each column's
            (S z_i)_c, the output's entries themselves for the squared error. A model need not (and may not) take it
            off itself.
        curvature: ``curvax.GaussNewton()`` by default, ``curvax.Fisher()`` or ``curvax.EmpiricalFisher()``.
        method: "cholesky" forms R R^T and factorises it; "cg" solves by conjugate gradients on it; "auto" takes the
            first for up to 1024 rows.
        tolerance: The relative residual at which they stop.
        seed: Seed of what ``curvature`` draws.

    Returns:
        The transformation. ``inner_iterations`` is 0 where the system was factorised.

    Raises:
        ValueError: The model couples examples.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((3, 1)), (jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), jnp.array([[1.0], [4.0]]))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tx = optax.chain(curvax.scale_by_sample_space(layers, damping=1e-6), optax.scale(-1.0))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> print((w + updates)[:, 0].round(3))
        [1. 2. 0.]
    """
    check_arguments(scale_by_sample_space, locals())
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("scale_by_sample_space", curvature, OutputCurvature)

    def step(given: Given) -> Step:
        updates, at = given.gradient, given.at
        found = find_layers_at(at) if layers is None else layers
        paths = trees.leaf_paths(updates)
        own = [i for i, path in enumerate(found.paths) if path in paths]
        space = SampleSpace(tap(found, at), curvature, own, given.key, centered)
        strength = given.number(damping)
        start, right = None, trees.embed(updates, at.params)
        if momentum is not None:
            start = trees.embed(trees.scale(given.number(momentum), given.memory), at.params)
            # Of parameters without structure the space knows no products, so that they go without momentum.
            start = trees.replace_leaves(start, found.unstructured, trees.zeros_like(start))
            right = trees.sub(right, space.lift(space.project(start)))
        solution, iterations = space.solve(
            right, strength, method=method, max_iterations=max_iterations, tolerance=given.number(tolerance)
        )
        whole = solution if start is None else trees.add(start, solution)
        result = trees.cast_like(trees.extract(whole, updates), updates)
        figures = {"damping": strength, "inner_iterations": iterations}
        return Step(result, figures, memory=() if momentum is None else result)

    # The last result, which momentum carries over.
    start = nothing if momentum is None else trees.zeros_like
    return stepper("scale_by_sample_space", step, start=start, seed=seed)
