"""K-FAC against algorithm 7 of Martens 2016 written out in numpy: factors, damping, rescaling, momentum, adaptation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks.operations import flops
from curvax.damping import BestOfThree, kfac_rule
from curvax.transforms._arguments import cases_per_example, stride_of
from tests import oracles
from tests.transforms.stepping import flat, gradient, loss, moved, run

SIZES = (4, 5, 3)
L2 = 0.01


def network(params, x):
    for index, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if index < len(params) - 1:
            x = jnp.tanh(x)
    return x


def parameters(seed=0, scale=1.0):
    draw = np.random.default_rng(seed)
    pairs = itertools.pairwise(SIZES)
    return [
        {"b": jnp.asarray(0.1 * draw.normal(size=n)), "w": jnp.asarray(scale * draw.normal(size=(m, n)))}
        for m, n in pairs
    ]


def data(count=12, seed=1):
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.normal(size=(count, SIZES[0]))), jnp.asarray(draw.integers(0, SIZES[-1], count))


PARAMS, DATA = parameters(), data()
OBJECTIVE = curvax.Objective(network, curvax.losses.softmax_cross_entropy(), l2=L2)
LAYERS = curvax.find_layers(OBJECTIVE, PARAMS, DATA)
FACTORS = {"statistics": curvax.Fisher(num_samples=1), "statistics_stride": 1}
WHOLE = {"statistics": curvax.Fisher(), "statistics_stride": 1, "curvature_stride": 1, "decay": 0.95}


def factors_of(params, batch):
    """For any two layers i <= j E[a_i a_j^T] and E[g_i g_j^T] with g under the model's own distribution, by hand."""
    a = np.asarray(batch[0])
    weights = [np.asarray(layer["w"]) for layer in params]
    biases = [np.asarray(layer["b"]) for layer in params]
    inputs = [a, np.tanh(a @ weights[0] + biases[0])]
    outputs = inputs[1] @ weights[1] + biases[1]
    p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    homogeneous = [np.concatenate([x, np.ones((len(x), 1))], axis=1) for x in inputs]
    cotangents = []
    for label in range(SIZES[-1]):
        g2 = p - np.eye(SIZES[-1])[label]
        g1 = (g2 @ weights[1].T) * (1 - inputs[1] ** 2)
        cotangents.append((p[:, label, None] / len(a), (g1, g2)))
    return {
        (i, j): (
            homogeneous[i].T @ homogeneous[j] / len(a),
            sum((share * g[i]).T @ g[j] for share, g in cotangents),
        )
        for i, j in ((0, 0), (0, 1), (1, 1))
    }


def damped_inverse(factors, gamma, vector, inverse="block_diagonal"):
    """The inverse times a vector, by a dense matrix; vectors as the leaves are ordered, b before w.

    Factored damping A + pi gamma I and G + gamma / pi I, or gamma^2 I for exact_tikhonov. Of two layers the matrix
    whose inverse is block-tridiagonal is the one of all four blocks.
    """
    sides, blocks = {}, {}
    for (i, j), (a, g) in factors.items():
        if i == j and inverse != "exact_tikhonov":
            pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
            a, g = a + pi * gamma * np.eye(len(a)), g + gamma / pi * np.eye(len(g))
        sides[i, j] = np.kron(a, g)
    if inverse == "exact_tikhonov":
        sides = {key: side + gamma**2 * np.eye(len(side)) for key, side in sides.items() if key[0] == key[1]}
    for i, j in itertools.product(range(2), repeat=2):
        apart = i != j and inverse != "block_tridiagonal"
        side = sides[i, j] if (i, j) in sides else sides[j, i].T if (j, i) in sides else None
        blocks[i, j] = np.zeros((len(sides[i, i]), len(sides[j, j]))) if apart else side
    rows, place = [], 0
    for m, n in itertools.pairwise(SIZES):
        bias, weight = vector[place : place + n], vector[place + n : place + n + m * n].reshape(m, n)
        rows.append(np.concatenate([weight, bias[None]]).reshape(-1))
        place += n + m * n
    matrix = np.block([[blocks[i, j] for j in range(2)] for i in range(2)])
    solved = np.split(np.linalg.solve(matrix, np.concatenate(rows)), [len(rows[0])])
    matrices = [x.reshape(-1, n) for x, n in zip(solved, SIZES[1:], strict=True)]
    return np.concatenate([part.reshape(-1) for x in matrices for part in (x[-1], x[:-1])])


class Algorithm7:
    """The method on one batch, exact in everything, step by step.

    ``rate`` and ``momentum`` may be numbers or schedules, and one alone; the strides take every so many-th case,
    beginning with one case later at every step; ``other`` is a batch for factors and model where it is not the step's.
    """

    def __init__(
        self,
        damping,
        *,
        refresh=2,
        gamma_rule=None,
        rate=None,
        momentum=None,
        inverse="block_diagonal",
        decay=0.95,
        strides=(1, 1),
        objective=OBJECTIVE,
        other=None,
    ):
        self.damping, self.refresh, self.rule, self.decay = damping, refresh, gamma_rule, decay
        self.fixed, self.inverse, self.strides = (rate, momentum), inverse, strides
        self.objective, self.other = objective, other
        self.gamma = None if gamma_rule is None else np.sqrt(damping + L2)
        self.k, self.factors, self.inverted, self.last = 0, None, None, None

    def step(self, params, batch):
        seen = batch if self.other is None else self.other
        some, more = (jax.tree.map(lambda leaf, n=n: leaf[self.k % n :: n], seen) for n in self.strides)
        coefficients = [value(self.k) if callable(value) else value for value in self.fixed]
        self.k += 1
        new = factors_of(params, some)
        keep = min(1 - 1 / self.k, self.decay)
        old = new if self.factors is None else self.factors
        self.factors = {
            key: tuple(keep * x + (1 - keep) * y for x, y in zip(old[key], new[key], strict=True)) for key in new
        }
        g = gradient(self.objective, params, batch)
        exact = np.asarray(oracles.dense_fisher(self.objective, params, more))
        damped = exact + self.damping * np.eye(len(g))
        gamma = np.sqrt(self.damping + L2) if self.rule is None else self.gamma
        compared = self.rule is not None and self.k % self.rule.period == 0
        if self.k % self.refresh == 0 or self.k <= 3 or compared:
            self.inverted = (self.factors, gamma)
        tried = [self.attempt(g, damped, coefficients, *self.inverted)]
        if compared:
            others = (gamma * self.rule.factor, gamma / self.rule.factor)
            tried += [self.attempt(g, damped, coefficients, self.factors, other) for other in others]
        best = min(tried, key=lambda attempt: attempt[0])
        predicted, delta, self.inverted = best
        if self.rule is not None:
            self.gamma = self.inverted[1]
        self.last = delta
        return delta, predicted

    def attempt(self, g, damped, given, factors, gamma):
        direction = -damped_inverse(factors, gamma, g, self.inverse)
        basis = direction[:, None] if self.last is None else np.stack([direction, self.last], axis=1)
        matrix, slopes = basis.T @ damped @ basis, basis.T @ g
        given = given[: len(slopes)]
        free = [i for i, value in enumerate(given) if value is None]
        coefficients = np.array([0.0 if value is None else value for value in given])
        rest = slopes + matrix @ coefficients
        coefficients[free] = -np.linalg.solve(matrix[np.ix_(free, free)], rest[free])
        value = coefficients @ slopes + coefficients @ matrix @ coefficients / 2
        return value, basis @ coefficients, (factors, gamma)


def follow(tx, oracle, rule, steps, **points):
    """The steps of the method are those of the oracle, and lambda follows the rule at the ratio on the step's batch."""
    for taken in run(tx, oracle.objective, PARAMS, DATA, steps, **points):
        delta, predicted = oracle.step(taken.before, DATA)
        np.testing.assert_allclose(flat(taken.updates), delta, rtol=1e-6, atol=1e-9 * np.abs(delta).max())
        np.testing.assert_allclose(taken.state.info.predicted_change, predicted, rtol=1e-6)
        np.testing.assert_allclose(taken.state.info.damping, oracle.damping, rtol=1e-6)
        if oracle.k % rule.period == 0:
            change = loss(oracle.objective, moved(taken.before, delta), DATA)
            change -= loss(oracle.objective, taken.before, DATA)
            ratio = change / predicted
            np.testing.assert_allclose(taken.state.info.step_ratio, ratio, rtol=1e-5)
            oracle.damping *= rule.decrease if ratio > rule.good_ratio else 1
            oracle.damping *= rule.increase if ratio < rule.bad_ratio else 1
    return taken


def test_steps_are_those_of_algorithm_7_with_gamma_tied_to_lambda():
    rule = kfac_rule(period=2)
    tx = curvax.kfac(
        LAYERS, initial_damping=0.5, judged_by="same_batch", rule=rule, refresh_period=2, momentum=None, **WHOLE
    )
    last = follow(tx, Algorithm7(0.5), rule, 7)
    assert last.state.info.damping != 0.5
    np.testing.assert_allclose(last.state.info.extra["gamma"] ** 2, last.state.info.damping + L2)


@pytest.mark.parametrize("refresh", [2, 5])
def test_steps_are_those_of_algorithm_7_with_the_best_of_three_gammas(refresh):
    """Also where the periods do not fit: the three that are compared are all of the present factors."""
    rule, gamma_rule = kfac_rule(period=2), BestOfThree(factor=0.5, period=2)
    tx = curvax.kfac(
        LAYERS,
        initial_damping=0.5,
        judged_by="same_batch",
        rule=rule,
        gamma_rule=gamma_rule,
        refresh_period=refresh,
        **WHOLE,
    )
    oracle = Algorithm7(0.5, refresh=refresh, gamma_rule=gamma_rule)
    last = follow(tx, oracle, rule, 7)
    np.testing.assert_allclose(last.state.info.extra["gamma"], oracle.gamma)
    assert oracle.gamma != np.sqrt(0.5 + L2)


@pytest.mark.parametrize("inverse", ["block_tridiagonal", "exact_tikhonov"])
@pytest.mark.parametrize("gamma_rule", [None, BestOfThree(factor=0.5, period=2)])
def test_steps_are_those_of_algorithm_7_with_every_inverse(inverse, gamma_rule):
    rule, same = kfac_rule(period=2), {"judged_by": "same_batch", "gamma_rule": gamma_rule}
    tx = curvax.kfac(LAYERS, inverse=inverse, initial_damping=0.5, rule=rule, refresh_period=2, **same, **WHOLE)
    follow(tx, Algorithm7(0.5, inverse=inverse, gamma_rule=gamma_rule), rule, 7)


def test_inverses_that_start_from_the_last_ones_end_where_others_do():
    """Newton-Schulz through the state of the optimiser, whose inverses change from one refresh to the next."""
    rule, inverse = kfac_rule(period=2), curvax.layers.BlockDiagonal("newton_schulz")
    same = {"judged_by": "same_batch", "rule": rule}
    tx = curvax.kfac(LAYERS, inverse=inverse, initial_damping=0.5, refresh_period=2, **same, **WHOLE)
    follow(tx, Algorithm7(0.5), rule, 7)


@pytest.mark.parametrize(
    ("rate", "momentum"),
    [
        (0.3, 0.8),
        (0.3, None),
        (None, 0.8),
        (None, 0.0),
        (optax.exponential_decay(0.5, 1, 0.6), optax.linear_schedule(0.2, 0.8, 3)),
    ],
    ids=["both", "rate", "momentum", "no momentum", "schedules"],
)
def test_rates_that_are_given_take_the_place_of_the_best_ones(rate, momentum):
    given = {"learning_rate": rate, "momentum": momentum}
    tx = curvax.kfac(LAYERS, initial_damping=0.5, judged_by="same_batch", refresh_period=2, **given, **WHOLE)
    follow(tx, Algorithm7(0.5, rate=rate, momentum=momentum), kfac_rule(period=1000), 4)


def test_a_short_average_forgets():
    """epsilon = min(1 - 1/k, 0.4): the cap is in force from the second step on."""
    tx = curvax.kfac(LAYERS, damping=0.5, refresh_period=1, **(WHOLE | {"decay": 0.4}))
    follow(tx, Algorithm7(0.5, refresh=1, decay=0.4), kfac_rule(period=1000), 5)


def test_strides_take_some_of_the_batch_and_others_at_every_step():
    """Factors of every third case, the model of every second, from one further on each time."""
    parts = {"statistics_stride": 3, "curvature_stride": 2}
    tx = curvax.kfac(LAYERS, damping=0.5, refresh_period=1, **(WHOLE | parts))
    follow(tx, Algorithm7(0.5, refresh=1, strides=(3, 2)), kfac_rule(period=1000), 5)


def test_curvature_may_be_of_another_batch_than_the_gradient():
    other = data(20, seed=5)
    tx = curvax.kfac(LAYERS, damping=0.5, refresh_period=1, **WHOLE)
    follow(tx, Algorithm7(0.5, refresh=1, other=other), kfac_rule(period=1000), 4, curvature_at=other)


def test_a_penalty_of_some_leaves_is_in_gamma_and_in_the_model_for_those_alone():
    """KF-18 with biases left out: gamma^2 = lambda + eta for all, eta in the model where the penalty is."""
    mask = [{"b": False, "w": True}] * 2
    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy(), l2=L2, l2_mask=mask)
    layers = curvax.find_layers(objective, PARAMS, DATA)
    tx = curvax.kfac(layers, damping=0.5, refresh_period=1, **WHOLE)
    follow(tx, Algorithm7(0.5, refresh=1, objective=objective), kfac_rule(period=1000), 4)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_positions_are_shared_as_asked(sharing):
    """The update by the factors of ``kronecker_factors`` with that sharing, which differ; another name is refused."""
    objective, shape, _ = SEQUENCES["with a layer of means"]
    params, batch, layers = sequences(objective, shape)
    options = {"damping": 0.3, "statistics": curvax.GaussNewton(), "statistics_stride": 1}
    tx = curvax.scale_by_kfac(layers, sharing=sharing, **options)

    @jax.jit
    def compute(params):
        at = objective.linearize(params, batch)
        found, expected = tx.update(params, tx.init(params), params, at=at)[0], {}
        for name in ("expand", "reduce"):
            factors = curvax.layers.kronecker_factors(
                curvax.tap(layers, at), curvature=curvax.GaussNewton(), sharing=name
            )
            expected[name] = curvax.layers.kronecker_preconditioner(layers, factors, damping=0.3)(params)
        return found, expected

    found, expected = compute(params)
    np.testing.assert_allclose(flat(found), flat(expected[sharing]), rtol=1e-9)
    assert not np.allclose(flat(expected["expand"]), flat(expected["reduce"]), rtol=1e-2)
    for method in (curvax.kfac, curvax.scale_by_kfac):
        with pytest.raises(ValueError, match=f"{method.__name__}: sharing"):
            method(layers, sharing="expnad")


@pytest.mark.parametrize("folded", [False, True])
def test_a_mask_that_leaves_few_steps_leaves_all_of_their_inputs(folded):
    """One step of many counts: moments of inputs by some of the positions would mostly be of none that does."""
    draw = np.random.default_rng(3)
    steps, width = 400, 3
    params = {"w": jnp.asarray(draw.normal(size=(width, 2)))}
    last = jnp.broadcast_to(jnp.arange(steps) == steps - 1, (8, steps))
    batch = jnp.asarray(draw.normal(size=(8, steps, width))), jnp.zeros((8, steps, 2)), last
    if folded:  # into the axis of the examples, on the way out
        batch = batch[0], batch[1].reshape(-1, 2), batch[2].reshape(-1)
    objective = curvax.Objective(
        lambda p, x: (x @ p["w"]).reshape(-1, 2) if folded else x @ p["w"],
        curvax.losses.squared_error(),
        select=lambda batch: batch[:2],
        mask=lambda batch: batch[2],
    )
    layers = curvax.find_layers(objective, params, batch)
    tx = curvax.scale_by_kfac(layers, damping=0.1)
    state = run(optax.chain(tx, optax.set_to_zero()), objective, params, batch, 3)[-1].state[0]
    inputs = np.asarray(batch[0])[:, -1]
    np.testing.assert_allclose(state.memory.factors.inputs[0][0], inputs.T @ inputs / 8, rtol=1e-9)
    assert state.memory.batches == 3


def test_the_divergence_of_a_step_is_bounded():
    bound = 1e-4
    tx = curvax.kfac(LAYERS, initial_damping=0.5, max_divergence=bound, judged_by="same_batch", **WHOLE)
    for taken in run(tx, OBJECTIVE, PARAMS, DATA, 3):
        step = flat(taken.updates)
        exact = np.asarray(oracles.dense_fisher(OBJECTIVE.replace(l2=None), taken.before, DATA))
        np.testing.assert_allclose(step @ exact @ step / 2, bound, rtol=1e-6)


def test_the_bound_on_the_divergence_is_one_on_predictions_and_not_on_the_penalty():
    plain = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    heavy, bound = plain.replace(l2=10.0), 1e-4
    tx = curvax.kfac(LAYERS, initial_damping=0.5, max_divergence=bound, judged_by="same_batch", **WHOLE)
    for taken in run(tx, heavy, PARAMS, DATA, 3):
        step, exact = flat(taken.updates), np.asarray(oracles.dense_fisher(plain, taken.before, DATA))
        np.testing.assert_allclose(step @ exact @ step / 2, bound, rtol=1e-6)


@pytest.mark.parametrize("damping", [0.3, optax.exponential_decay(0.5, 1, 0.5)])
def test_a_damping_that_is_given_stays(damping):
    """The steps are those of algorithm 7 with that lambda, and no batch judges them."""
    tx = curvax.kfac(LAYERS, damping=damping, refresh_period=1, **WHOLE)
    at = damping if callable(damping) else lambda _: damping
    oracle = Algorithm7(at(0), refresh=1)
    for step, taken in enumerate(run(tx, OBJECTIVE, PARAMS, DATA, 4)):
        oracle.damping = float(at(step))
        delta, _ = oracle.step(taken.before, DATA)
        np.testing.assert_allclose(taken.state.info.damping, oracle.damping, rtol=1e-12)
        np.testing.assert_allclose(flat(taken.updates), delta, rtol=1e-6, atol=1e-9 * np.abs(delta).max())
    with pytest.raises(ValueError, match="damping= is a lambda that stays"):
        curvax.kfac(LAYERS, damping=damping, initial_damping=1.0)


def test_on_a_quadratic_it_is_preconditioned_conjugate_gradients():
    """KF-19: with a fixed preconditioner and the objective's own curvature, alpha and mu are those of the method."""
    draw = np.random.default_rng(3)
    w, x, scales = draw.normal(size=(4, 3)), draw.normal(size=(20, 4)), np.exp(draw.normal(size=(20, 3)))
    batch = ((jnp.asarray(x), jnp.asarray(scales)), jnp.asarray(draw.normal(size=(20, 3))))
    penalty = 0.05
    objective = curvax.Objective(lambda w, pair: (pair[0] @ w) * pair[1], curvax.losses.squared_error(), l2=penalty)
    w = jnp.asarray(w)
    keep = curvax.damping.DampingRule(decrease=1, increase=1)
    exact = {**WHOLE, "statistics": curvax.GaussNewton()}
    layers = curvax.find_layers(objective, w, batch)
    tx = curvax.kfac(layers, initial_damping=0.0, judged_by="same_batch", rule=keep, **exact)
    steps = run(tx, objective, w, batch, 8)

    matrix = np.asarray(oracles.dense_ggn(objective, w, batch))
    a, g = x.T @ x / 20, np.diag(np.mean(scales**2, axis=0))
    pi = np.sqrt(np.trace(a) / 4 / (np.trace(g) / 3))
    gamma = np.sqrt(penalty)
    preconditioner = np.kron(a + pi * gamma * np.eye(4), g + gamma / pi * np.eye(3))
    residual = gradient(objective, w, batch)
    solved = np.linalg.solve(preconditioner, residual)
    direction = -solved
    for taken in steps:
        size = residual @ solved / (direction @ matrix @ direction)
        np.testing.assert_allclose(flat(taken.updates), size * direction, rtol=1e-6, atol=1e-10)
        new = residual + size * matrix @ direction
        new_solved = np.linalg.solve(preconditioner, new)
        direction = -new_solved + (new @ new_solved) / (residual @ solved) * direction
        residual, solved = new, new_solved


def test_scale_by_kfac_multiplies_any_vector_by_the_damped_inverse():
    vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), PARAMS)
    at = OBJECTIVE.linearize(PARAMS, DATA)
    tx = curvax.scale_by_kfac(LAYERS, damping=0.3, statistics=curvax.Fisher(), statistics_stride=1)
    scaled, state = jax.jit(lambda v, at: tx.update(v, tx.init(PARAMS), PARAMS, at=at))(vector, at)
    expected = damped_inverse(factors_of(PARAMS, DATA), np.sqrt(0.3 + L2), flat(vector))
    np.testing.assert_allclose(flat(scaled), expected, rtol=1e-9)
    assert state.info.damping == 0.3


def test_inverses_are_kept_between_refreshes():
    tx = curvax.kfac(LAYERS, refresh_period=5, **WHOLE)
    prepared = [jax.tree.leaves(taken.state.memory.prepared)[0] for taken in run(tx, OBJECTIVE, PARAMS, DATA, 11)]
    changed = [k + 1 for k in range(1, 11) if not np.array_equal(prepared[k], prepared[k - 1])]
    assert changed == [2, 3, 5, 10]


def test_blocks_take_turns_within_a_period_when_asked():
    """Each of the two blocks once in five steps, at different ones, and what it gets is its inverse of then."""
    tx = curvax.scale_by_kfac(LAYERS, damping=0.1, refresh_period=5, spread_refresh=True, **FACTORS)
    every = curvax.scale_by_kfac(LAYERS, damping=0.1, refresh_period=1, **FACTORS)
    # The parameters stand still, so that the factors of both are the same at every step.
    still = optax.set_to_zero()
    some, whole = (
        [taken.state[0].memory.prepared for taken in run(optax.chain(method, still), OBJECTIVE, PARAMS, DATA, 13)]
        for method in (tx, every)
    )
    turns = [
        {k for k in range(4, 13) if not np.array_equal(some[k][block][0], some[k - 1][block][0])} for block in range(2)
    ]
    assert all(np.diff(sorted(own)).tolist() in ([], [5]) for own in turns)
    assert all(turns)
    assert not turns[0] & turns[1]
    for block, own in enumerate(turns):
        for k in own:
            np.testing.assert_allclose(some[k][block][0], whole[k][block][0], rtol=1e-12)


def test_the_next_batch_judges_the_last_step():
    """Lambda follows the rule at the ratio on the new batch, whose loss is taken at both ends of the step."""
    rule = kfac_rule(period=1)
    tx = curvax.kfac(LAYERS, initial_damping=0.1, rule=rule, **WHOLE)
    batches = [data(seed=seed) for seed in range(4)]
    params, state = PARAMS, tx.init(PARAMS)
    expected, before = 0.1, None

    @jax.jit
    def step(params, state, batch):
        _, grads, at = OBJECTIVE.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, at=at)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        if before is not None:
            old, predicted = before
            ratio = (loss(OBJECTIVE, params, batch) - loss(OBJECTIVE, old, batch)) / predicted
            expected *= rule.decrease if ratio > rule.good_ratio else rule.increase if ratio < rule.bad_ratio else 1
        before = params
        params, state = step(params, state, batch)
        before = before, float(state.info.predicted_change)
        np.testing.assert_allclose(state.info.damping, expected, rtol=1e-6)
    assert expected != 0.1
    assert state.info.undone_steps == 0


def test_a_step_that_does_harm_on_the_next_batch_is_undone():
    """The second batch has other inputs, where the weights of one that was fitted without damping are far too large."""
    draw = np.random.default_rng(7)
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    first = jnp.asarray(1e-3 * draw.normal(size=(8, 3))), jnp.ones((8, 1))
    second = jnp.asarray(draw.normal(size=(8, 3))), jnp.ones((8, 1))
    w = jnp.zeros((3, 1))
    layers = curvax.find_layers(objective, w, first)
    tx = curvax.kfac(layers, initial_damping=1e-10, **{**WHOLE, "statistics": curvax.GaussNewton()})

    @jax.jit
    def step(params, state, batch):
        _, grads, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, at=at)
        return optax.apply_updates(params, updates), state

    once, state = step(w, tx.init(w), first)
    rise = loss(objective, once, second) - loss(objective, w, second)
    assert rise > 100 * -float(state.info.predicted_change) > 0
    back, after = step(once, state, second)
    np.testing.assert_allclose(flat(back), flat(w), atol=1e-12)
    assert after.info.undone_steps == 1
    assert after.strength == 4 * state.strength
    again, last = step(back, after, second)
    assert last.info.undone_steps == 1
    assert loss(objective, again, second) < loss(objective, w, second)


def test_an_inverse_that_is_not_finite_is_not_kept():
    """A factor that is not positive definite, as rounding can make one, leaves the inverse of its block as it was."""
    tx = curvax.scale_by_kfac(LAYERS, damping=1e-3, refresh_period=1, **FACTORS)
    state = run(tx, OBJECTIVE, PARAMS, DATA, 4)[-1].state
    factors = state.memory.factors
    poisoned = factors._replace(inputs=(factors.inputs[0] - 1e3 * jnp.eye(5), *factors.inputs[1:]))
    after = run(tx, OBJECTIVE, PARAMS, DATA, 1, state=state._replace(memory=state.memory._replace(factors=poisoned)))[0]
    old, new = state.memory.prepared, after.state.memory.prepared
    np.testing.assert_array_equal(new[0][0], old[0][0])
    assert not np.array_equal(new[1][0], old[1][0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.updates))


def masked_objective():
    """Squared error, which targets enter by the gradient alone, on the cases that a mask leaves."""
    return curvax.Objective(
        lambda params, batch: network(params, batch),
        curvax.losses.squared_error(),
        select=lambda batch: batch[:2],
        mask=lambda batch: batch[2],
    )


def masked_data(mask, bad_target=False):
    inputs = data(16)[0]
    targets = jnp.sin(inputs[:, :3])
    return inputs, targets.at[0, 0].set(jnp.nan) if bad_target else targets, mask


def masked_step(tx, objective):
    @jax.jit
    def step(params, state, batch):
        _, grads, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, at=at)
        return optax.apply_updates(params, updates), state

    return step


def test_a_batch_that_is_nearly_or_altogether_masked():
    """What is taken of it has its one case, wherever it is; one without cases is skipped before anything has begun."""
    objective = masked_objective()
    layers = curvax.find_layers(objective, PARAMS, masked_data(jnp.ones(16, bool)))
    tx = curvax.kfac(layers, statistics_stride=4, curvature_stride=4)
    step = masked_step(tx, objective)
    one = jnp.arange(16) == 6
    params, state = step(PARAMS, jax.jit(tx.init)(PARAMS), masked_data(one))
    assert state.info.damping > 1e-6
    assert state.info.predicted_change < 0
    assert loss(objective, params, masked_data(one)) < loss(objective, PARAMS, masked_data(one))
    same, skipped = step(PARAMS, jax.jit(tx.init)(PARAMS), masked_data(jnp.zeros(16, bool)))
    np.testing.assert_array_equal(flat(same), flat(PARAMS))
    assert skipped.info.skipped_steps == 1
    kept = state.memory.factors
    _, later = step(params, state, masked_data(jnp.zeros(16, bool)))
    jax.tree.map(np.testing.assert_array_equal, later.memory.factors, kept)


@pytest.mark.parametrize("name", ["kfac", "scale_by_kfac"])
def test_a_first_batch_that_is_masked_altogether_is_as_if_it_had_not_been(name):
    """Averages that began with it would be of half the curvature, on each side."""
    objective, every = masked_objective(), jnp.ones(16, bool)
    layers = curvax.find_layers(objective, PARAMS, masked_data(every))
    exact = {"statistics": curvax.GaussNewton(), "statistics_stride": 1}
    if name == "kfac":
        tx = curvax.kfac(layers, initial_damping=1.0, curvature_stride=1, **exact)
    else:
        tx = optax.chain(curvax.scale_by_kfac(layers, damping=1.0, **exact), optax.scale(-0.1))
    step, fresh = masked_step(tx, objective), jax.jit(tx.init)(PARAMS)
    same, blank = step(PARAMS, fresh, masked_data(~every))
    np.testing.assert_array_equal(flat(same), flat(PARAMS))
    one, other = (step(PARAMS, state, masked_data(every))[0] for state in (fresh, blank))
    np.testing.assert_allclose(flat(one), flat(other), rtol=1e-12)
    assert not np.array_equal(flat(one), flat(PARAMS))


@pytest.mark.many_compilations("the states are compared leaf by leaf outside of jit")
def test_a_masked_batch_teaches_the_eigenvalues_nothing():
    objective, every = masked_objective(), jnp.ones(16, bool)
    layers = curvax.find_layers(objective, PARAMS, masked_data(every))
    tx = curvax.kfac(layers, inverse="eigen_corrected", refresh_period=100, curvature_stride=1, **FACTORS)
    step, params, state = masked_step(tx, objective), PARAMS, jax.jit(tx.init)(PARAMS)
    for _ in range(4):
        params, state = step(params, state, masked_data(every))
    _, later = step(params, state, masked_data(~every))
    jax.tree.map(np.testing.assert_array_equal, later.memory.prepared.values, state.memory.prepared.values)


@pytest.mark.parametrize("method", ["cholesky", "eigen"])
def test_a_singular_factor_has_an_inverse_whatever_the_damping(method):
    """Two inputs that are always alike, in float32: damping below the rounding of their moments is raised to it."""
    w, x = jnp.zeros((2, 3), jnp.float32), jnp.ones((6, 2), jnp.float32)
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    batch = x, jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    layers = curvax.find_layers(objective, w, batch)
    inverse = curvax.layers.BlockDiagonal(method=method)
    tx = curvax.scale_by_kfac(
        layers, damping=1e-20, inverse=inverse, statistics=curvax.GaussNewton(), statistics_stride=1
    )
    taken = run(optax.chain(tx, optax.scale(-1.0)), objective, w, batch)[0]
    # The mean of the targets is fitted by any w whose columns add up to it; that of least norm has them alike.
    np.testing.assert_allclose(taken.after, np.broadcast_to(np.mean(batch[1], axis=0) / 2, (2, 3)), rtol=5e-2)


def test_blocks_of_other_inverses_do_not_take_turns():
    with pytest.raises(ValueError, match="spread_refresh=True is for inverses block by block"):
        curvax.kfac(LAYERS, inverse="block_tridiagonal", spread_refresh=True)


@pytest.mark.many_compilations("the states are compared leaf by leaf outside of jit")
@pytest.mark.parametrize("hidden", [False, True])
def test_a_model_or_a_mask_without_any_matrix(hidden):
    """Scales alone, by their diagonals: of a model that has nothing else, or with its matrix hidden."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    params = {"gain": jnp.ones(4), "w": w} if hidden else {"gain": jnp.ones(4)}
    objective = curvax.Objective(
        lambda p, x: (x * p["gain"]) @ (p["w"] if hidden else w), curvax.losses.squared_error()
    )
    batch = DATA[0], jnp.ones((12, 2))
    layers = curvax.find_layers(objective, params, batch)
    tx = curvax.kfac(layers, curvature_stride=1, statistics_stride=1)
    tx = optax.masked(tx, {"gain": True, "w": False}) if hidden else tx

    @jax.jit
    def step(params, state):
        before, grads, at = objective.value_and_grad(params, batch)
        grads = grads | {name: jnp.zeros_like(grads[name]) for name in grads if name == "w"}
        updates, state = tx.update(grads, state, params, at=at)
        return before, optax.apply_updates(params, updates), state

    losses, state = [], tx.init(params)
    for _ in range(6):
        before, params, state = step(params, state)
        losses.append(float(before))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_array_equal(params.get("w", w), w)


def test_a_skipped_step_leaves_factors_and_inverses():
    """A target that is not finite: the factors, which targets do not enter, are not taken in; nor at a refresh."""
    objective = masked_objective()
    good, bad = masked_data(jnp.ones(16, bool)), masked_data(jnp.ones(16, bool), bad_target=True)
    tx = curvax.kfac(curvax.find_layers(objective, PARAMS, good), refresh_period=5, **FACTORS)
    step, params, state = masked_step(tx, objective), PARAMS, jax.jit(tx.init)(PARAMS)
    for _ in range(4):
        params, state = step(params, state, good)
    same, skipped = step(params, state, bad)
    np.testing.assert_array_equal(flat(same), flat(params))
    jax.tree.map(np.testing.assert_array_equal, skipped.memory, state.memory)
    assert skipped.info.skipped_steps == 1


def test_a_point_in_chunks_gives_parts_of_the_size_of_a_chunk():
    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    batch = data(24)
    tx = curvax.kfac(curvax.find_layers(objective, PARAMS, batch))

    def step(carry, _):
        params, state = carry
        _, grads, at = objective.value_and_grad(params, batch, chunk_size=8)
        updates, state = tx.update(grads, state, params, at=at)
        params = optax.apply_updates(params, updates)
        return (params, state), objective(params, batch)

    def run(key):
        start = PARAMS, tx.init(PARAMS)._replace(key=jax.random.key_data(key))
        return jax.lax.scan(step, start, None, length=8)[1]

    # Of every seed: a chunk has too few examples for the curvature along a step, which is that of all chunks.
    losses = jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(jax.random.key(0), 10))
    assert np.max(losses) < 0.9 * loss(objective, PARAMS, batch)
    assert np.max(losses[:, -1]) < 0.5 * loss(objective, PARAMS, batch)


@pytest.mark.parametrize("inverse", ["block_tridiagonal", "exact_tikhonov", "eigen_corrected"])
def test_every_inverse_trains(inverse):
    tx = curvax.kfac(LAYERS, inverse=inverse, gamma_rule=BestOfThree(period=4), refresh_period=2, **WHOLE)
    losses = [float(taken.state.info.loss) for taken in run(tx, OBJECTIVE, PARAMS, DATA, 12)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("inverse", "size"),
    [("block_diagonal", 128), ("block_diagonal", 256), ("block_tridiagonal", 128), ("eigen_corrected", 128)],
)
def test_mini_batches_end_near_their_lowest_loss(inverse, size):
    """300 steps at the defaults, on batches of a sixth or third of the data: what was learnt is not lost again."""
    draw = np.random.default_rng(11)
    inputs = draw.normal(size=(768, SIZES[0]))
    targets = np.argmax(np.tanh(inputs @ draw.normal(size=(SIZES[0], 8))) @ draw.normal(size=(8, SIZES[-1])), axis=1)
    flipped = draw.random(768) < 0.1
    targets = np.where(flipped, draw.integers(0, SIZES[-1], 768), targets)
    whole = jnp.asarray(inputs), jnp.asarray(targets)
    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    tx = curvax.kfac(curvax.find_layers(objective, PARAMS, whole), inverse=inverse)

    @jax.jit
    def train(params, state, chosen):
        def body(carry, rows):
            params, state = carry
            _, grads, at = objective.value_and_grad(params, jax.tree.map(lambda leaf: leaf[rows], whole))
            updates, state = tx.update(grads, state, params, at=at)
            params = optax.apply_updates(params, updates)
            return (params, state), objective(params, whole)

        return jax.lax.scan(body, (params, state), chosen)

    chosen = jnp.asarray(np.stack([draw.permutation(768)[:size] for _ in range(300)]))
    (_, state), losses = train(PARAMS, jax.jit(tx.init)(PARAMS), chosen)
    assert losses[-1] < 1.5 * losses.min()
    assert losses.max() < 3 * losses[0]
    assert losses.min() < 0.6 * losses[0]
    assert state.info.skipped_steps == 0


def in_one_use(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def with_a_bias_that_is_a_gain_too(p, x):
    return in_one_use(p, x) * p["b"]


@pytest.mark.parametrize("model", [in_one_use, with_a_bias_that_is_a_gain_too])
@pytest.mark.parametrize("gradient", ["its own", "scaled"])
def test_a_batch_of_fewer_rows_than_features_gives_the_same_step_by_its_rows(gradient, model):
    """KF-15: the rank of a gradient is that of its batch; what stands in front in a chain still has its effect."""
    draw = np.random.default_rng(5)
    params = {"w": jnp.asarray(draw.normal(size=(30, 20))), "b": jnp.asarray(draw.normal(size=20))}
    objective = curvax.Objective(model, curvax.losses.squared_error())
    batch = jnp.asarray(draw.normal(size=(4, 30))), jnp.asarray(draw.normal(size=(4, 20)))
    layers = curvax.find_layers(objective, params, batch)
    tx = curvax.scale_by_kfac(layers, damping=0.1, statistics=curvax.GaussNewton(), statistics_stride=1)
    factor = 1.0 if gradient == "its own" else 0.5

    @jax.jit
    def by_rows(params):
        _, grads, at = objective.value_and_grad(params, batch)
        assert at.is_gradient(grads)
        return tx.update(
            grads if gradient == "its own" else jax.tree.map(lambda g: factor * g, grads),
            tx.init(params),
            params,
            at=at,
        )[0]

    @jax.jit
    def by_matrices(params):
        grads = jax.tree.map(lambda g: factor * g, jax.grad(objective)(params, batch))
        return tx.update(grads, tx.init(params), params, at=objective.linearize(params, batch))[0]

    np.testing.assert_allclose(flat(by_rows(params)), flat(by_matrices(params)), rtol=1e-9)
    if gradient == "its own" and model is in_one_use:
        assert flops(by_rows, params) < flops(by_matrices, params)


def every_step(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def under_a_scan(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["w"], p["v"]]))[0]


def tied(p, x):
    return jnp.tanh(x @ p["w"] @ p["v"]) @ p["w"].T


def with_a_layer_of_means(p, x):
    return jnp.tanh(x @ p["w"]) + (jnp.mean(x, axis=1) @ p["v"])[:, None]


def one_number(p, x):
    return every_step(p, x)[..., 0]


def one_head(p, x):
    return jnp.mean(jnp.tanh(x @ p["w"]), axis=1) @ p["v"]


def last_state(p, x):
    """A recurrence whose loss is that of its end."""

    def step(h, x):
        return jnp.tanh(x @ p["w"] + h @ p["v"]), None

    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[0]


CLASSES, VECTORS = curvax.losses.softmax_cross_entropy(), curvax.losses.squared_error()
SEQUENCES = {
    "every step": (curvax.Objective(every_step, CLASSES), (5,), 5),
    "every step a vector": (curvax.Objective(every_step, VECTORS), (5, 4), 5),
    "under a scan": (curvax.Objective(under_a_scan, CLASSES), (5,), 5),
    "tied": (curvax.Objective(tied, CLASSES), (5,), 5),
    "every step a number": (curvax.Objective(one_number, VECTORS), (5,), 1),
    "some steps": (curvax.Objective(every_step, CLASSES, mask=lambda batch: batch[1] > 0), (5,), 1),
    "no loss": (curvax.Objective(every_step, curvax.losses.curvature_only(CLASSES)), (5,), 1),
    "with a layer of means": (curvax.Objective(with_a_layer_of_means, CLASSES), (5,), 1),
    "one head": (curvax.Objective(one_head, CLASSES), (), 1),
    "the last state": (curvax.Objective(last_state, VECTORS), (4,), 1),
}


def sequences(objective, shape):
    draw = np.random.default_rng(4)
    params = {name: jnp.asarray(draw.normal(size=(4, 4)) / 2) for name in ("v", "w")}
    targets = draw.integers(0, 4, (240, *shape))
    if objective.terms[0].loss == VECTORS:
        targets = targets.astype(float)
    batch = jnp.asarray(draw.normal(size=(240, 5, 4))), jnp.asarray(targets)
    return params, batch, curvax.find_layers(objective, params, batch)


@pytest.mark.parametrize("case", SEQUENCES)
def test_steps_of_sequences_count_where_every_factor_and_the_loss_have_them(case):
    objective, shape, cases = SEQUENCES[case]
    params, batch, layers = sequences(objective, shape)
    assert cases_per_example(layers, objective.linearize(params, batch)) == cases
    assert cases_per_example(layers, objective.linearize(params, batch, chunk_size=60)) == 1
    assert cases_per_example(layers.restricted([]), objective.linearize(params, batch)) == 1


@pytest.mark.parametrize(
    ("count", "cases", "stride"), [(1000, 1, 8), (300, 1, 2), (100, 1, 1), (100, 5, 4), (64, 64, 8), (12, 64, 1)]
)
def test_how_many_examples_are_left(count, cases, stride):
    """125 cases or more, and 8 examples."""
    at = OBJECTIVE.linearize(PARAMS, data(count))
    assert stride_of("kfac", "statistics_stride", None, at, most=8, least=125, cases=cases) == stride


def test_a_model_of_sequences_has_its_curvature_from_some_of_them():
    """Every step a case: what the step counts is that of the strides given."""
    draw = np.random.default_rng(4)
    params = {name: jnp.asarray(draw.normal(size=(24, 24)) / 5) for name in ("v", "w")}
    batch = jnp.asarray(draw.normal(size=(64, 10, 24))), jnp.asarray(draw.integers(0, 24, (64, 10)))
    objective = curvax.Objective(every_step, curvax.losses.softmax_cross_entropy())
    layers = curvax.find_layers(objective, params, batch)

    def count(**options):
        tx = curvax.kfac(layers, **options)

        def step(params, state):
            _, grads, at = objective.value_and_grad(params, batch)
            return tx.update(grads, state, params, at=at)

        return flops(step, params, jax.eval_shape(tx.init, params), while_trip_count=1, alarms=True)

    assert count() == count(statistics_stride=5, curvature_stride=2)
    assert count() < 0.8 * count(statistics_stride=1, curvature_stride=1)
    # Where an example is one case to the statistics there are too few to leave any out.
    assert count(sharing="reduce") == count(sharing="reduce", statistics_stride=1, curvature_stride=2)
    corrected = {"inverse": "eigen_corrected", "curvature_stride": 2}
    assert count(**corrected) > 1.1 * count(**corrected, statistics_stride=5)


def test_the_block_tridiagonal_inverse_has_the_curvature_along_its_steps_from_more_of_the_batch():
    """Of 1,000 examples from all, where the block-diagonal one has every fourth, and of 4,000 both."""

    def count(examples, **options):
        batch = data(examples)
        tx = curvax.kfac(LAYERS, statistics_stride=8, **options)

        def step(params, state):
            _, grads, at = OBJECTIVE.value_and_grad(params, batch)
            return tx.update(grads, state, params, at=at)

        return flops(step, PARAMS, jax.eval_shape(tx.init, PARAMS), while_trip_count=1, alarms=True)

    for inverse, strides in (("block_diagonal", {1000: 4, 4000: 4}), ("block_tridiagonal", {1000: 1, 4000: 4})):
        for examples, stride in strides.items():
            assert count(examples, inverse=inverse) == count(examples, inverse=inverse, curvature_stride=stride)


def test_steps_that_are_folded_into_the_examples_are_taken_whole():
    """There are so many that some would do, but there is no telling which inputs and outputs go together."""
    draw = np.random.default_rng(2)
    params = {"w": jnp.asarray(draw.normal(size=(3, 4)) / 2), "v": jnp.asarray(draw.normal(size=(4, 2)))}
    batch = jnp.asarray(draw.normal(size=(200, 5, 3))), jnp.asarray(draw.normal(size=(1000, 2)))
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x.reshape(-1, 3) @ p["w"]) @ p["v"], curvax.losses.squared_error()
    )
    layers = curvax.find_layers(objective, params, batch)
    losses = [float(taken.state.info.loss) for taken in run(curvax.kfac(layers), objective, params, batch, 5)]
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(ValueError, match="take all of them, by a stride of 1"):
        run(curvax.kfac(layers, curvature_stride=2), objective, params, batch)
