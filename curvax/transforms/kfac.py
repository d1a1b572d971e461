"""K-FAC: natural gradient steps by Kronecker-factored curvature (Martens and Grosse 2015; Martens 2016, chapter 6)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import trees
from curvax.checks import check_choice
from curvax.damping.rules import BestOfThree, DampingRule, kfac_rule, next_batch_rule
from curvax.layers.ekfac import EigenCorrected
from curvax.layers.factor_damping import mean_curvature
from curvax.layers.factors import (
    KroneckerFactors,
    Sharing,
    SomePositions,
    factors_are_finite,
    factors_of,
    running_average,
    sides_are_finite,
    zero_factors,
)
from curvax.layers.find import Layers
from curvax.layers.inverses import BlockDiagonal, ExactTikhonov, Inverse, precondition, precondition_gradient
from curvax.layers.taps import TappedPoint, tap
from curvax.layers.tridiagonal import BlockTridiagonal
from curvax.matrices.curvature import Fisher, GaussNewton, OutputCurvature, check_curvature
from curvax.matrices.plane import inner_products, minimum_in_plane, penalty_in_plane, products_in_plane
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._arguments import cases_per_example, check_arguments, part_of, stride_of
from curvax.transforms._judge import JudgedBy, judged_here, judging
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array, PyTree

InverseName = Literal["block_diagonal", "block_tridiagonal", "exact_tikhonov", "eigen_corrected"]
_INVERSES = {
    "block_diagonal": BlockDiagonal,
    "block_tridiagonal": BlockTridiagonal,
    "exact_tikhonov": ExactTikhonov,
    "eigen_corrected": EigenCorrected,
}

_LEAST = 125
"""So many cases are enough for the statistics of a step, as they enter running averages."""


def kfac(
    layers: Layers,
    *,
    inverse: InverseName | Inverse = "block_diagonal",
    damping: optax.ScalarOrSchedule | None = None,
    initial_damping: float | None = None,
    rule: DampingRule | None = None,
    judged_by: JudgedBy = "next_batch",
    gamma_rule: BestOfThree | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: optax.ScalarOrSchedule | None = None,
    max_divergence: optax.ScalarOrSchedule | None = None,
    refresh_period: optax.ScalarOrSchedule = 10,
    spread_refresh: bool = False,
    statistics_stride: int | None = None,
    curvature_stride: int | None = None,
    decay: optax.ScalarOrSchedule = 0.9,
    curvature: OutputCurvature | None = None,
    statistics: OutputCurvature | None = None,
    sharing: Sharing = "expand",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC: delta = alpha Delta + mu delta_0 with Delta = -F^{-1} g by Kronecker factors and delta_0 the last step.

    Algorithm 7 of Martens 2016. At every step the factors of a part of the batch, with targets drawn from the model,
    enter running averages; their damped inverses are worked out anew from time to time. alpha and mu minimise the
    quadratic model with the exact curvature matrix B, damped by lambda, on a part of the batch, so that an inverse that
    is only nearly right still gives a step of the right length. lambda adapts by how well the model predicts.

    ``update`` takes ``at=``, and optionally ``curvature_at=``, a point on another batch for factors and model. The last
    step is what the parameters moved by since the last update, whatever stands behind in the chain.

    By default a step is judged by the next batch, which its curvature has not seen: lambda falls where the loss of the
    new batch fell by half of what was predicted and grows where it rose by as much; a rise by three times the
    prediction is undone, and counted in ``undone_steps``. It takes a forward pass where the rule is due, and where the
    loss jumps from one batch to the next. The rule of the paper, ``judged_by="same_batch"``, is for batches so large
    that what fits them fits all data: with smaller ones it lets lambda fall until steps fit the batch alone.

    The method of the paper has ``judged_by="same_batch"``, ``gamma_rule=curvax.damping.BestOfThree()``,
    ``initial_damping=150.0``, ``refresh_period=20``, ``decay=0.95`` and strides of 8 and 4; its l2 is that of the
    objective; its average of the iterates is
    ``optax.chain(curvax.kfac(layers), curvax.average_iterates("exponential"))``.

    Args:
        layers: From ``curvax.find_layers``; printed, it shows which parameters have Kronecker factors. Others have the
            diagonal of their curvature, and with ``fallback="gradient"`` the mean curvature of the rest.
        damping: lambda, a number or a schedule; None lets it adapt. With one that is given nothing is undone: it is to
            be tuned, with the learning rate if that is given too.
        initial_damping: What adapting begins with; if None the mean curvature of the first batch, the trace of F over
            its size, which follows the scale of the loss.
        inverse: What is inverted, by name or as a value that holds more choices: "block_diagonal", "block_tridiagonal",
            "exact_tikhonov" or "eigen_corrected"; ``curvax.layers.BlockDiagonal()`` and so on.
        rule: How lambda adapts; ``next_batch_rule()`` or ``kfac_rule()`` of ``curvax.damping``, as ``judged_by`` says.
        gamma_rule: How the damping gamma^2 of the factors adapts: None ties it to lambda (and the penalty), a
            ``BestOfThree`` tries three from time to time, each with inverses of its own.
        learning_rate: alpha, a number or a schedule; None for the best one.
        momentum: mu likewise; 0 for none.
        max_divergence: A bound on 1/2 delta^T B delta, the divergence of the predictions to second order.
        refresh_period: Steps from one set of inverses to the next, T_3; the first three steps all have new ones.
        spread_refresh: Whether the blocks of a block-diagonal inverse take turns within the period, so that no step is
            slow, in place of all at once.
        statistics_stride: Every so many-th example of a batch is for the factors, 1/tau_1, from one further on at
            every step; if None, so that some 125 or more are, but no more than every eighth, and for a block-diagonal
            inverse of the positions that share weights so many as give four rows for each input, all where they are
            masked or weighted. Where all layers with Kronecker factors read several positions of an example, and as
            many have losses of their own, such as the steps of a sequence, those are what is counted, of 8 examples or
            more: not where steps are masked or weighted, with "reduce" or corrected eigenvalues.
        curvature_stride: Every so many-th is for B, 1/tau_2, from one further on at every step; if None, so that some
            250 or more are, 1,000 with the block-tridiagonal inverse, counted likewise, but no more than every fourth;
            of a point in chunks of fewer than that all, chunk by chunk.
        decay: epsilon of the running averages once they are long; the paper has 0.95.
        curvature: B, ``curvax.GaussNewton()`` if None.
        statistics: The curvature of the factors, ``curvax.Fisher(num_samples=1)`` if None; see ``kronecker_factors``.
        sharing: See ``curvax.layers.kronecker_factors``.
        seed: Seed of what is drawn.

    Returns:
        The transformation; ``state.info`` has alpha as ``step_size``, and ``momentum`` and ``gamma`` in ``extra``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tx = curvax.kfac(layers, initial_damping=1e-8, statistics_stride=1, curvature_stride=1)
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = jax.jit(tx.update)(grads, tx.init(w), w, at=at)
        >>> bool(objective(optax.apply_updates(w, updates), batch) < 0.1 * loss)
        True

    Source: Martens and Grosse 2015; Martens 2016, chapter 6.
    """
    check_arguments(kfac, locals())
    if damping is not None and not (initial_damping is None and rule is None):
        raise ValueError("kfac: damping= is a lambda that stays; initial_damping= and rule= are for one that adapts")
    rule, judge = judging(judged_by, rule, kfac_rule(), next_batch_rule(), damped=True)
    judge = judge if damping is None else None
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("kfac", curvature, OutputCurvature)
    preconditioner = _Preconditioner(
        "kfac", layers, inverse, statistics, sharing, statistics_stride, refresh_period, spread_refresh, decay
    )

    def start(params):
        own = preconditioner.start(params)
        return own if gamma_rule is None else own._replace(gamma=trees.wide_zero(params))

    def step(given: Given) -> Step:
        at, dtype = given.curvature_at, given.dtype
        seen = preconditioner.seen(given, at, given.key)
        cases = cases_per_example(seen.layers, at)
        least = preconditioner.inverse.curvature_cases
        part = part_of("kfac", "curvature_stride", curvature_stride, at, given.steps, most=4, least=least, cases=cases)
        strength = given.strength if damping is None else given.number(damping)
        begun = jnp.array(True)
        if damping is None and initial_damping is None:
            begun = (given.steps > 0) | seen.informative
            first = jnp.maximum(mean_curvature(seen.layers, seen.factors).astype(dtype), rule.minimum)
            strength = jnp.where(given.steps == 0, first, strength)
        gradient, before = (trees.embed(v, at.params) for v in (given.gradient, given.last_change))
        rate, share = (None if x is None else given.number(x) for x in (learning_rate, momentum))
        fixed = None if rate is None else -rate, share

        def model(natural) -> tuple[Array, Array]:
            """(-alpha, mu) and M(-alpha natural + mu before) - M(0), exactly on a part of the batch (KF-10, KF-11)."""
            exact = products_in_plane(part, curvature, natural, before, given.other_key).astype(dtype)
            products = exact + strength * inner_products(natural, before).astype(dtype)
            if part.penalty:
                products = products + penalty_in_plane(part, natural, before).astype(dtype)
            slopes = trees.vdots((gradient, natural), (gradient, before)).astype(dtype)
            coefficients = minimum_in_plane(products, slopes, fixed)
            if max_divergence is not None:
                divergence = coefficients @ exact @ coefficients / 2
                allowed = given.number(max_divergence) / jnp.where(divergence > 0, divergence, 1)
                coefficients = coefficients * jnp.where(divergence > 0, jnp.sqrt(jnp.minimum(1, allowed)), 1)
            return coefficients, coefficients @ slopes + coefficients @ products @ coefficients / 2

        def attempt(gamma, prepared):
            natural = preconditioner(given, seen, prepared, gamma)
            return Attempt(gamma, prepared, natural, *model(natural))

        gamma, periodic, due = _gamma(given, strength), jnp.array(False), jnp.array(False)
        if gamma_rule is not None:  # it begins with that of lambda and the penalty, and then has a life of its own
            gamma = jnp.where(given.steps == 0, gamma, given.memory.gamma)
            periodic = gamma_rule.due(given.steps + 1)
            due = periodic & seen.usable
        # Inverses that are compared are all of the present factors.
        best = attempt(gamma, preconditioner.refreshed(given, seen, gamma, due))
        if gamma_rule is not None:
            best = _best_of_three(
                periodic, due, gamma_rule, best, lambda g, p: attempt(g, preconditioner.redamped(seen, p, g))
            )
        kept_gamma = () if gamma_rule is None else jnp.where(seen.usable, best.gamma, given.memory.gamma)
        rise, mu = best.coefficients
        delta = trees.extract(trees.add_scaled(trees.scale(rise, best.natural), mu, before), given.gradient)
        loss = given.at.loss.astype(dtype)
        figures = {
            "loss": loss,
            "predicted_change": best.predicted,
            "damping": strength,
            "step_ratio": given.info.step_ratio,
            "step_size": -rise,
            "momentum": mu,
            "gamma": best.gamma,
        }
        adapted = strength
        if damping is None and judge is None:
            figures["step_ratio"], adapted = judged_here(rule, given, strength, delta, loss, best.predicted)
        return Step(
            delta,
            figures,
            memory=Memory(seen.factors, seen.batches, best.prepared, kept_gamma),
            strength=adapted if damping is None else None,
            finite=trees.all_finite(loss, best.predicted) & begun,
            guarded=True,
        )

    return stepper(
        "kfac",
        step,
        start=start,
        strength=0.0 if initial_damping is None else initial_damping,
        seed=seed,
        extra={"momentum": None, "gamma": None},
        points=("at", "curvature_at"),
        judge=judge,
        keeps_last=True,
    )


def scale_by_kfac(
    layers: Layers,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    inverse: InverseName | Inverse = "block_diagonal",
    refresh_period: optax.ScalarOrSchedule = 10,
    spread_refresh: bool = False,
    statistics_stride: int | None = None,
    decay: optax.ScalarOrSchedule = 0.9,
    statistics: OutputCurvature | None = None,
    sharing: Sharing = "expand",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by F^{-1}, the damped inverse of Kronecker-factored curvature.

    It preconditions whatever updates arrive and reads no loss value: chain a learning rate, momentum, a clip of the
    norm behind it. Nothing adapts, so that rate and damping are to be tuned together; ``curvax.kfac`` does without.
    Arguments are those of ``curvax.kfac``.

    Args:
        damping: lambda, a number or a schedule; the factors are damped by its square root, each by its share.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2) * 2.0**0.5, jnp.ones((2, 1)))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tx = curvax.scale_by_kfac(
        ...     layers, damping=1e-12, statistics=curvax.GaussNewton(), statistics_stride=1)
        >>> updates, _ = jax.jit(tx.update)(jnp.ones((2, 1)), tx.init(w), w, at=objective.linearize(w, batch))
        >>> updates.round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Martens and Grosse 2015; Martens 2016, sections 6.3 to 6.5.
    """
    check_arguments(scale_by_kfac, locals())
    preconditioner = _Preconditioner(
        "scale_by_kfac", layers, inverse, statistics, sharing, statistics_stride, refresh_period, spread_refresh, decay
    )

    def step(given: Given) -> Step:
        at, strength = given.curvature_at, given.number(damping)
        seen, gamma = preconditioner.seen(given, at, given.key), _gamma(given, strength)
        prepared = preconditioner.refreshed(given, seen, gamma)
        update = preconditioner(given, seen, prepared, gamma)
        memory = Memory(seen.factors, seen.batches, prepared, ())
        return Step(trees.extract(update, given.gradient), {"damping": strength}, memory=memory, guarded=True)

    points = ("at", "curvature_at")
    return stepper("scale_by_kfac", step, start=preconditioner.start, seed=seed, points=points)


class Attempt(NamedTuple):
    """The natural gradient F^{-1} g by inverses with that gamma, and what the model says of the best step along it."""

    gamma: Array
    prepared: Any
    natural: PyTree
    coefficients: Array
    predicted: Array


def _best_of_three(
    periodic: Array, due: Array, rule: BestOfThree, first: Attempt, attempt: Callable[[Array, Any], Attempt]
) -> Attempt:
    """Where it is due, the best of the attempts with gamma, omega gamma and gamma / omega; else the first (KF-13).

    A loop that is run no time at all passes its state on without a copy, which a ``cond`` does not promise. But what
    does not change in a loop, such as identities of the size of the factors, XLA takes out of it, and would work out at
    every step. It takes nothing out of a branch: that it is the period's turn is always so inside of the loop.
    """
    candidates = rule.candidates(first.gamma)
    number = jnp.where(due, len(candidates), 1)

    def body(carry):
        index, best = carry

        def better():
            found = attempt(candidates[index], first.prepared)
            return trees.where(rule.prefers(found.predicted, best.predicted), found, best)

        return index + 1, jax.lax.cond(periodic, better, lambda: best)

    return jax.lax.while_loop(lambda carry: carry[0] < number, body, (jnp.asarray(1), first))[1]


class Seen(NamedTuple):
    """What a step knows of the curvature: the part of its batch for statistics, and the running averages with it.

    Attributes:
        usable: Whether gradient and loss are finite and the step is one, so that what is seen may be kept.
        informative: Whether the batch has curvature, which one that is masked altogether has not.
        kept: Whether the averages have its factors in them: it is both, and they are finite.
        batches: Of how many batches they are.
    """

    layers: Layers
    tapped: TappedPoint
    key: Array
    factors: KroneckerFactors
    usable: Array
    informative: Array
    kept: Array
    batches: Array


class Memory(NamedTuple):
    """What K-FAC carries from step to step.

    Attributes:
        batches: Of how many batches the averages are; steps on batches without curvature are not among them.
        prepared: What the inverse keeps.
        gamma: The square root of the damping of the factors where it has a life of its own, else ().
    """

    factors: KroneckerFactors
    batches: Array
    prepared: Any
    gamma: Any


def _inverse(name, inverse):
    if isinstance(inverse, Inverse):
        return inverse
    check_choice(f"{name}: inverse", inverse, _INVERSES)
    return _INVERSES[inverse]()


def _gamma(given, damping):
    """The square root of the damping and of the penalty's strength (KF-8)."""
    return jnp.sqrt(damping + given.largest_penalty.astype(damping.dtype))


class _Preconditioner:
    """Statistics and inverses, which ``kfac`` and ``scale_by_kfac`` have in common."""

    def __init__(self, name, layers, inverse, statistics, sharing, stride, period, spread, decay):
        if not isinstance(layers, Layers):
            raise TypeError(
                f"{name}: the first argument is curvax.find_layers(objective, params, batch), got {layers!r}"
            )
        self.name, self.layers, self.sharing = name, layers, sharing
        check_choice(f"{name}: sharing", sharing, get_args(Sharing))
        self.inverse = _inverse(name, inverse)
        self.statistics = Fisher(num_samples=1) if statistics is None else statistics
        check_curvature(name, self.statistics, OutputCurvature)
        self.stride, self.period, self.spread, self.decay = stride, period, spread, decay
        if spread and not self.inverse.has_two_sides:
            raise ValueError(
                f"{name}: spread_refresh=True is for inverses block by block, which {self.inverse} is not; leave it"
                ' out, or take inverse="block_diagonal"'
            )

    def own(self, tree: PyTree) -> Layers:
        """The layers of the leaves that this tree has."""
        return self.layers.restricted(trees.leaf_paths(tree))

    def start(self, params: PyTree) -> Memory:
        layers = self.own(params)
        factors = zero_factors(layers, self.inverse.pairs(layers))
        return Memory(factors, jnp.zeros((), jnp.int32), self.inverse.start(layers), ())

    def seen(self, given: Given, at: CurvaturePoint, key: Array) -> Seen:
        """The running averages with the factors of this batch, or of its part for statistics (KF-3, KF-14)."""
        layers = self.own(given.gradient)
        # Where positions are added up an example is one case, as it is in averages of squared gradients.
        one = self.sharing == "reduce" or self.inverse.observes_gradients
        cases = 1 if one else cases_per_example(layers, at)
        stride = stride_of(self.name, "statistics_stride", self.stride, at, most=8, least=_LEAST, cases=cases)
        tapped = tap(layers, at.subset(stride, given.steps))
        pairs = self.inverse.pairs(layers)
        key, positions_key = jax.random.split(key)
        # Moments of two layers with one another go together only with moments of the same rows.
        some = SomePositions(positions_key, 4, _LEAST) if self.stride is None and not pairs else None
        new = factors_of(tapped, key, self.statistics, self.sharing, pairs, some)
        # A step that is skipped or undone leaves all as it was, and a batch that is masked altogether says nothing.
        usable = trees.all_finite(given.gradient, given.at.loss) & ~given.undo
        nothing = not (layers.treatment.kronecker or layers.treatment.diagonal)
        informative = jnp.array(nothing) | (mean_curvature(layers, new) > 0)
        kept = trees.all_true(usable, factors_are_finite(new), informative)
        before = given.memory
        factors = running_average(before.factors, new, before.batches + 1, given.number(self.decay), kept)
        return Seen(layers, tapped, key, factors, usable, informative, kept, before.batches + kept.astype(jnp.int32))

    def refreshed(self, given: Given, seen: Seen, gamma: Array, at_once: Array | bool = False) -> Any:
        """The inverses, worked out anew where it is time or ``at_once``, with what they learn from this batch."""
        previous = given.memory.prepared
        period = jnp.maximum(jnp.asarray(given.number(self.period)).astype(jnp.int32), 1)

        def due(phase):
            return (((given.steps + 1 + phase) % period == 0) | (seen.batches <= 3) | at_once) & seen.usable

        if self.spread:
            prepared = self._some_refreshed(seen, gamma, previous, period, due)
        else:
            prepared = jax.lax.cond(
                due(0), lambda: self._anew(seen.factors, seen.layers, gamma, previous), lambda: previous
            )
        decay = given.number(self.decay)
        observed = self.inverse.observe(
            seen.layers, prepared, seen.tapped, seen.key, curvature=self.statistics, count=seen.batches, decay=decay
        )
        return prepared if observed is prepared else trees.where(seen.kept, observed, prepared)

    def _anew(self, factors, layers, gamma, previous):
        # Rounding can make a factor indefinite: then the last inverse has to do.
        prepared = self.inverse.prepare(layers, factors, gamma, previous)
        if self.inverse.has_two_sides:

            def usable(finite, new, old):  # by a branch, which passes on what is there
                return jax.lax.cond(finite, lambda: new, lambda: old)

            return tuple(map(usable, sides_are_finite(prepared), prepared, previous))
        return trees.where(trees.all_finite(prepared), prepared, previous)

    def _some_refreshed(self, seen, gamma, previous, period, due):
        """The inverses of each block when it is its turn, by shares of the cubes of their sizes."""
        blocks = seen.layers.treatment.kronecker
        costs = np.array([float(n) * (i**3 + o**3) for n, i, o in (block.shape for block in blocks)])
        middles = (np.cumsum(costs) - costs / 2) / np.sum(costs)
        prepared, last = [], None
        for place, middle in enumerate(middles):
            own = KroneckerFactors((seen.factors.inputs[place],), (seen.factors.outputs[place],), (), (), ())
            own, _ = jax.lax.optimization_barrier((own, last))  # one block after another, as ``sequenced`` says
            phase = (jnp.float32(middle) * period.astype(jnp.float32)).astype(jnp.int32)
            before = (previous[place],)
            refresh = functools.partial(self._anew, own, seen.layers, gamma, before)
            last = jax.lax.cond(due(phase), refresh, lambda before=before: before)
            prepared.append(last[0])
        return tuple(prepared)

    def redamped(self, seen: Seen, prepared: Any, gamma: Array) -> Any:
        """The inverses of the same factors with another damping."""
        return self.inverse.redamp(seen.layers, seen.factors, gamma, prepared)

    def __call__(self, given: Given, seen: Seen, prepared: Any, gamma: Array) -> PyTree:
        """F^{-1} g; of a gradient that has come straight from the point by the rows of its batch (KF-15)."""
        gradient = trees.embed(given.gradient, given.at.params)
        arguments = seen.layers, self.inverse, prepared, seen.factors, gamma, gradient
        if given.at.chunk_size is None and given.at.is_gradient(given.gradient):
            return precondition_gradient(*arguments, given.at)
        return precondition(*arguments)
