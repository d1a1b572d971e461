"""SGD-QN against a loop of numpy over changing batches, and the bias of pairs of the step's own batch (CL-9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, tree_of

GOAL, PARAMS, DATA = problem("mlp")[1:]
DATA = jax.tree.map(np.asarray, DATA)
LINE = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())


def run(tx, goal, params, batches, same_batch=False):
    """(parameters, memory) before every step on the next of the batches."""

    @jax.jit
    def step(params, state, batch, last):
        _, grads, at = goal.value_and_grad(params, batch)
        further = {"curvature_at": goal.linearize(params, last)} if same_batch else {}
        updates, state = tx.update(grads, state, params, at=at, **further)
        return optax.apply_updates(params, updates), state

    state, history, last = tx.init(params), [], batches[0]
    for batch in batches:
        history.append((params, state[0].memory))
        params, state = step(params, state, batch, last)
        last = batch
    return [*history, (params, state[0].memory)]


@pytest.mark.parametrize("same_batch", [False, True])
@pytest.mark.parametrize("rule", ["sum", "average"])
def test_a_run_is_the_loop_with_the_pair_of_the_batch_that_is_asked_for(rule, same_batch):
    (goal, params), rate = (GOAL, PARAMS), 0.05
    batches = [tuple(leaf[i] for leaf in DATA) for i in np.random.default_rng(0).integers(0, len(DATA[0]), (6, 3))]
    tx = optax.chain(
        curvax.scale_by_sgd_qn(rule=rule, initial_curvature=2.0, min_curvature=0.1, max_curvature=5.0),
        optax.scale_by_learning_rate(rate),
    )
    history = run(tx, goal, params, batches, same_batch)
    p, now, before = np.full(flat(params).size, 0.5), flat(params), None
    for k, batch in enumerate(batches):
        if before is not None:
            measured = batches[k - 1] if same_batch else batch
            s = now - before
            y = gradient(goal, tree_of(now, params), measured) - gradient(goal, tree_of(before, params), measured)
            if rule == "sum":
                p = 1 / (1 / p + np.clip(y / s, 0.1, 5.0))
            else:
                p = p + (np.clip(s / y, 0.2, 10.0) - p) / (k + 1)
        before, now = now, now - rate * p * gradient(goal, tree_of(now, params), batch)
        np.testing.assert_allclose(flat(history[k + 1][0]), now, rtol=1e-6)
        np.testing.assert_allclose(flat(history[k + 1][1]), p, rtol=1e-5)


def test_pairs_of_the_steps_own_batch_are_biased():
    """Single examples with n independent inputs: s is along the input, y / s = |x|^2, n times the diagonal."""
    n, steps = 8, 400
    draw = np.random.default_rng(1)
    x, y = draw.choice([-1.0, 1.0], size=(steps, 1, n)), draw.normal(size=(steps, 1, 1))
    tx = optax.chain(
        curvax.scale_by_sgd_qn(min_curvature=-jnp.inf, max_curvature=jnp.inf, initial_curvature=100.0),
        optax.scale(-1.0),
    )

    @jax.jit
    def run(x, y):
        def step(carry, data):
            w, state, last = carry
            _, grads, at = LINE.value_and_grad(w, data)
            points = [{}, {"curvature_at": LINE.linearize(w, last)}]
            taken = [tx.update(grads, s, w, at=at, **p) for s, p in zip(state, points, strict=True)]
            # Both are told of the same steps: only what they make of them differs.
            return (w - 0.01 * grads, tuple(s for _, s in taken), data), None

        w = jnp.zeros((n, 1))
        (_, states, _), _ = jax.lax.scan(step, (w, (tx.init(w), tx.init(w)), (x[0], y[0])), (x, y))
        return [(1 / state[0].memory - 100.0) / (steps - 1) for state in states]

    following, own = run(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(own, n, rtol=1e-9)
    # [x x^T s]_j / s_j is one and n - 1 signs, whose mean has a deviation of sqrt((n - 1) / steps).
    np.testing.assert_allclose(following, 1.0, atol=5 * np.sqrt((n - 1) / steps))


def test_the_sum_is_the_schedule_of_stochastic_newton_steps():
    """On a separable quadratic without noise of the curvature: P = 1 / (h_0 + k h), as best for a noisy minimum."""
    goal = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
    h, draw = np.array([1.0, 4.0]), np.random.default_rng(0)
    targets = jnp.asarray(draw.normal(size=(300, 1, 2)))
    tx = optax.chain(curvax.scale_by_sgd_qn(), optax.scale(-1.0))

    @jax.jit
    def run(targets):
        def step(carry, target):
            w, state = carry
            _, grads, at = goal.value_and_grad(w, (jnp.sqrt(jnp.asarray(h))[None], target))
            updates, state = tx.update(grads, state, w, at=at)
            return (w + updates, state), None

        w = jnp.zeros(2)
        return jax.lax.scan(step, (w, tx.init(w)), targets)[0]

    w, state = run(targets)
    np.testing.assert_allclose(1 / state[0].memory, 1 + 299 * h, rtol=1e-6)
    # The mean of all targets, but for the one that 1 / P_0 counts as.
    np.testing.assert_allclose(w * np.sqrt(h), np.mean(targets, axis=(0, 1)), atol=0.02)


def test_an_entry_that_did_not_move_keeps_its_curvature():
    goal = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
    tx = optax.chain(curvax.scale_by_sgd_qn(rule="average"), optax.scale(-0.1))
    batch = jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 1.0]])
    history = run(tx, goal, jnp.ones(2), [batch] * 3)
    np.testing.assert_allclose(history[-1][1], [1.0, (1 + 2 / 4) / 3], rtol=1e-9)
