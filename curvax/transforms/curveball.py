"""CurveBall: momentum whose direction is a step of gradient descent on the quadratic model, at every iteration."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.damping.rules import DampingRule, curveball_rule, next_batch_rule
from curvax.matrices.plane import inner_products, minimum_in_plane
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.objectives.term import scale_cases
from curvax.transforms._arguments import check_arguments
from curvax.transforms._judge import JudgedBy, judging
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array, PyTree


def curveball(
    *,
    momentum: optax.ScalarOrSchedule | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    initial_damping: float = 1.0,
    rule: DampingRule | None = None,
    judged_by: JudgedBy = "next_batch",
    damped_model: bool = True,
    gradient: Literal["incoming", "recomputed"] = "incoming",
) -> optax.GradientTransformationExtraArgs:
    r"""CurveBall: z <- rho z - beta (G z + lambda z + g), theta <- theta + z.

    The bracket is the gradient of the quadratic model g^T z + 1/2 z^T (G + lambda I) z at the last step z, so every
    iteration takes one step of gradient descent on the model and then moves; nothing is solved. By default rho and beta
    minimise the model along z and the bracket, and lambda adapts, so that nothing is to be tuned. The step costs one
    push forward of z, one pull back and one push forward of the bracket; the state is that of momentum SGD, and with
    "next_batch" the parameters where the last step began.

    ``update`` takes ``at=``, whose batch the curvature is of. With
    ``gradient="recomputed"`` g is the gradient of the objective there, pulled back together with the curvature in one
    sweep: the incoming updates are not read, only their structure, so what stands in front in a chain has no effect,
    and whoever computes them inside the same ``jit`` does not pay for them.

    What the paper leaves open: whether lambda enters the model that gives rho, beta and the predicted change (see
    ``damped_model``), and whether 0.999 is the factor of lambda for one adaptation or for each of the five iterations
    between two (``rule=curvax.damping.curveball_rule(factor=0.999**5)``).

    Args:
        momentum: rho, a number or a schedule; None for the best one. 1 is the variant of the paper's appendix B.5.
        learning_rate: beta, a number or a schedule; None for the best one.
        initial_damping: lambda_0. The paper takes 1 for networks with batch normalisation and 10 for others; it may be
            wrong by a factor of a hundred.
        rule: How lambda adapts, every 5 steps, which takes a forward pass; if None ``next_batch_rule()``, or with
            ``judged_by="same_batch"`` that of the paper, ``curveball_rule()``, which changes lambda by a thousandth.
            ``DampingRule(decrease=1, increase=1)`` keeps it fixed, without the forward pass.
        judged_by: Whether the ratio is that of the "next_batch", and a step that raised its loss absurdly is undone, or
            that of the "same_batch" as in the paper.
        damped_model: Whether lambda z enters the model that rho, beta and the predicted change come from, as in the
            authors' published code, or the bracket alone, as equation 18 reads; without it steps on a nearly flat model
            are not bounded by lambda and may diverge.
        gradient: Where g comes from, the "incoming" updates or "recomputed" at the point.

    Returns:
        The transformation, with ``momentum`` rho and ``learning_rate`` beta in ``state.info.extra``; the ratio is that
        of the last step at which it was measured.

    Example:
        >>> def residuals(w, x):                                            # of Rosenbrock's function
        ...     return jnp.array([[w[0] - 1, 10 * (w[1] - w[0] ** 2)]])
        >>> objective = curvax.Objective(residuals, curvax.losses.squared_error())
        >>> tx = curvax.curveball()
        >>> w, batch = jnp.array([-1.0, 1.0]), (jnp.zeros((1, 1)), jnp.zeros((1, 2)))
        >>> state = tx.init(w)
        >>> @jax.jit
        ... def step(w, state):
        ...     loss, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     return optax.apply_updates(w, updates), state
        >>> for _ in range(100):
        ...     w, state = step(w, state)
        >>> bool(jnp.allclose(w, 1.0, atol=1e-2))
        True

    Source: Henriques, Ehrhardt, Albanie and Vedaldi 2019 ("Small steps and giant leaps"), algorithm 1, eqs. 16 to 18.
    """
    check_arguments(curveball, locals())
    rule, judge = judging(judged_by, rule, curveball_rule(), next_batch_rule(), damped=damped_model)
    adapts = not rule.decrease == rule.increase == 1
    if gradient not in ("incoming", "recomputed"):
        raise ValueError(f"gradient must be 'incoming' or 'recomputed', got {gradient!r}")

    def step(given: Given) -> Step:
        at, z, damping, dtype = given.at, given.memory, given.strength, given.dtype
        model = _Model(at, given.gradient, given.gradient if gradient == "incoming" else None)

        bracket, pushed = model.gradient_at(z)
        bracket = trees.add_scaled(bracket, damping, z)
        slopes, products = model.forms(bracket, z, pushed)
        if damped_model:
            products = products + damping * inner_products(bracket, z)
        products, slopes = products.astype(dtype), slopes.astype(dtype)
        # The step is -beta * bracket + rho * z.
        fixed_rate = None if learning_rate is None else -given.number(learning_rate)
        fixed_momentum = None if momentum is None else given.number(momentum)
        along = minimum_in_plane(products, slopes, (fixed_rate, fixed_momentum))
        beta, rho = -along[0], along[1]
        delta = trees.add_scaled(trees.scale(rho, z), -beta, bracket)
        predicted = along @ slopes + along @ products @ along / 2

        loss = at.loss.astype(dtype)

        def measure():
            return reduction_ratio(loss, at.loss_along(delta), predicted).astype(dtype)

        ratio, strength = given.info.step_ratio, damping
        if adapts and judge is None:
            ratio = jax.lax.cond((given.steps + 1) % rule.period == 0, measure, lambda: ratio)
            strength = rule.adapt(damping, ratio, count=given.steps + 1)
        figures = {
            "loss": loss,
            "predicted_change": predicted,
            "step_ratio": ratio,
            "damping": damping,
            "momentum": rho,
            "learning_rate": beta,
        }
        if gradient == "recomputed":  # not read, not even for its norm
            figures["gradient_norm"] = jnp.nan
        return Step(
            delta,
            figures,
            memory=delta,
            strength=strength,
            finite=trees.all_finite(loss, predicted),
            reads_updates=gradient == "incoming",
        )

    extra = {"momentum": None, "learning_rate": None}
    return stepper(
        "curveball",
        step,
        start=trees.zeros_like,
        strength=initial_damping,
        extra=extra,
        judge=judge if adapts else None,
        forget=trees.zeros_like,
    )


class _Model:
    """The undamped quadratic model on the leaves of ``like``: its gradient at z, and its forms on two vectors."""

    def __init__(self, at, like, gradient):
        self.at, self.like, self.gradient = at, like, gradient
        self.penalty = bool(at.penalty)

    def gradient_at(self, z: PyTree) -> tuple[PyTree, tuple[PyTree, ...] | None]:
        """G z + g in one pull back, and J z for each term where the batch is held whole (eqs. 16, 17)."""
        tangent = trees.embed(z, self.at.params)
        pushed = None
        if self.at.chunk_size is None:
            pushed = tuple(piece.jvp(tangent) for piece in self.at.pieces())

        def one(piece):
            curved = piece.loss.curvature(piece.outputs, piece.targets).product(
                piece.jvp(tangent) if piece.extra is None else piece.extra
            )
            if self.gradient is None:
                curved = trees.add(curved, piece.loss.gradient(piece.outputs, piece.targets))
            return piece.transpose(scale_cases(piece.scale, curved))

        total = trees.extract(self.at.accumulate(one, pushed), self.like)
        if self.penalty:
            about = z if self.gradient is not None else trees.add(z, self._own_params())
            total = trees.add(total, trees.multiply(about, self._penalty_curvature()))
        if self.gradient is not None:
            total = trees.add(total, self.gradient)
        return total, pushed

    def forms(self, bracket: PyTree, z: PyTree, pushed: tuple[PyTree, ...] | None) -> tuple[Array, Array]:
        """(g^T bracket, g^T z) and the matrix of x^T G y over x, y in (bracket, z), by one push forward (eq. 18)."""
        tangent = trees.embed(bracket, self.at.params)
        z_tangent = trees.embed(z, self.at.params)

        def one(piece):
            v = piece.jvp(tangent)
            u = piece.jvp(z_tangent) if piece.extra is None else piece.extra
            matrix = piece.loss.curvature(piece.outputs, piece.targets)
            curved_v, curved_u = (scale_cases(piece.scale, matrix.product(x)) for x in (v, u))
            cross = trees.vdot(u, curved_v)
            slope = scale_cases(piece.scale, piece.loss.gradient(piece.outputs, piece.targets))
            forms = jnp.stack([trees.vdot(v, curved_v), cross, cross, trees.vdot(u, curved_u)])
            return jnp.stack([trees.vdot(slope, v), trees.vdot(slope, u)]), forms.reshape(2, 2)

        slopes, products = self.at.accumulate(one, pushed)
        if self.penalty:
            weights, own = self._penalty_curvature(), self._own_params()
            pulls = [trees.vdot(trees.multiply(own, weights), x) for x in (bracket, z)]
            slopes = slopes + jnp.stack(pulls).astype(slopes.dtype)
            scaled = [trees.multiply(x, jax.tree.map(jnp.sqrt, weights)) for x in (bracket, z)]
            products = products + inner_products(*scaled).astype(products.dtype)
        if self.gradient is not None:
            slopes = jnp.stack([trees.vdot(self.gradient, x) for x in (bracket, z)])
        return slopes, products

    def _own_params(self):
        return trees.extract(self.at.params, self.like)

    def _penalty_curvature(self):
        return trees.extract(self.at.penalty.curvature(self.at.params), self.like)
