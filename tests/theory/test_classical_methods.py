"""What the thesis says of gradient descent, momentum and diagonal methods on quadratics (CL-1, CL-2, CL-11)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks import ravine


def spectral_radius(matrix):
    return np.max(np.abs(np.linalg.eigvals(matrix)))


def heavy_ball(curvatures, rate, momentum):
    """The matrix of (theta_k, theta_{k-1}) -> (theta_{k+1}, theta_k)."""
    own = np.diag((1 + momentum) - rate * curvatures)
    eye = np.eye(len(curvatures))
    return np.block([[own, -momentum * eye], [eye, 0 * eye]])


@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_the_best_rates_of_gradient_descent_and_momentum(condition):
    """(kappa - 1) / (kappa + 1) and (sqrt(kappa) - 1) / (sqrt(kappa) + 1), by optax's own steps (CL-2).

    With the new velocity in the update of theta: by the old one, as eq. 3.5 is printed, the same numbers diverge.
    """
    smallest, largest = 2.0, 2.0 * condition
    curvatures, root = np.geomspace(smallest, largest, 5), np.sqrt(condition)
    rate, momentum = 4 / (np.sqrt(largest) + np.sqrt(smallest)) ** 2, ((root - 1) / (root + 1)) ** 2
    descent = np.eye(5) - 2 / (largest + smallest) * np.diag(curvatures)
    np.testing.assert_allclose(spectral_radius(descent), (condition - 1) / (condition + 1), rtol=1e-12)
    ball = heavy_ball(curvatures, rate, momentum)
    # Two eigenvalues meet at either end, where rounding counts with its root.
    np.testing.assert_allclose(spectral_radius(ball), (root - 1) / (root + 1), rtol=1e-6)
    for factor in (0.9, 1.1):
        assert spectral_radius(heavy_ball(curvatures, factor * rate, momentum)) > spectral_radius(ball)
        assert spectral_radius(heavy_ball(curvatures, rate, momentum**factor)) > spectral_radius(ball)

    tx = optax.sgd(rate, momentum)

    @jax.jit
    def run(start):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(curvatures * w, state)
            return (w + updates, state), w

        return jax.lax.scan(step, (start, tx.init(start)), length=30)[1]

    expected, w = [], np.concatenate([np.ones(5), np.ones(5)])
    for _ in range(30):
        expected.append(w[:5])
        w = ball @ w
    np.testing.assert_allclose(run(jnp.ones(5)), np.stack(expected), rtol=1e-9, atol=1e-12)

    # As printed: theta moves by the old velocity, a step behind.
    eye = np.eye(5)
    behind = np.block([[eye, rate * eye], [-np.diag(curvatures), momentum * eye]])
    assert spectral_radius(behind) > 1


def test_momentum_adds_up_all_gradients_again_at_every_step():
    """theta_{k+1} = theta_0 - alpha sum_i sum_{j <= i} mu^(i-j) g_j: the sum over i is missing in print (E10)."""
    draw, rate, momentum = np.random.default_rng(0), 0.1, 0.8
    gradients, w, v = draw.normal(size=12), 1.0, 0.0
    for g in gradients:
        v = momentum * v - g
        w = w + rate * v
    single = [sum(momentum ** (i - j) * gradients[j] for j in range(i + 1)) for i in range(12)]
    np.testing.assert_allclose(w, 1 - rate * sum(single), rtol=1e-12)
    assert abs(w - (1 - rate * single[-1])) > 0.1


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_slow_momentum_has_the_noise_of_gradient_descent_and_its_speed_only_where_it_is_overdamped(c):
    """Of the limit alpha -> 0, mu -> 1 with c = alpha h / (1 - mu)^2 held (Wiegerinck et al. 1994; curvature h = 1).

    The stationary variance is that of gradient descent with the rate alpha / (1 - mu) whatever c is. The speed is so
    for small c alone: theta'' + theta' + c theta = 0 in the time k (1 - mu) decays like exp(-t / 2) from c = 1/4 on.
    """
    slow = 1e-3
    rate, momentum = c * slow**2, 1 - slow
    ball = heavy_ball(np.ones(1), rate, momentum)
    # P = M P M^T + rate^2 e e^T.
    noise = np.array([rate**2, 0, 0, 0])
    variance = np.linalg.solve(np.eye(4) - np.kron(ball, ball), noise)[0]
    effective = rate / slow
    np.testing.assert_allclose(variance, effective / (2 - effective), rtol=2 * slow)
    speed = -np.log(spectral_radius(ball)) / -np.log(1 - effective)
    expected = (1 - np.sqrt(1 - 4 * c)) / (2 * c) if c < 0.25 else 1 / (2 * c)
    np.testing.assert_allclose(speed, expected, rtol=2 * slow)


def test_conjugate_gradients_are_never_behind():
    """In the norm of B, in which they are optimal among methods of first order, on many spectra (CL-2)."""
    draw, size, steps = np.random.default_rng(0), 12, 8

    @jax.jit
    def energies(curvatures, start):
        def energy(w):
            return jnp.sum(curvatures * w**2)

        run = jax.vmap(
            lambda k: (
                curvax.solvers.cg(lambda v: curvatures * v, -curvatures * start, max_iterations=k, tolerance=0.0).value
            )
        )
        return jax.vmap(energy)(start + run(jnp.arange(1, steps + 1)))

    for _ in range(20):
        curvatures, start = np.sort(np.exp(2 * draw.normal(size=size))), draw.normal(size=size)
        root = np.sqrt(curvatures[-1] / curvatures[0])
        rate, momentum = (2 / (np.sqrt(curvatures[-1]) + np.sqrt(curvatures[0]))) ** 2, ((root - 1) / (root + 1)) ** 2
        ball, w, v = [], start, start
        plain, x = [], start
        for _ in range(steps):
            w, v = w - rate * curvatures * w + momentum * (w - v), w
            x = x - 2 / (curvatures[0] + curvatures[-1]) * curvatures * x
            ball.append(curvatures @ w**2)
            plain.append(curvatures @ x**2)
        conjugate = np.asarray(energies(jnp.asarray(curvatures), jnp.asarray(start)))
        assert np.all(conjugate <= np.minimum(ball, plain) * (1 + 1e-6))


@pytest.mark.parametrize("a", [15.0, 1e4])
def test_a_diagonal_does_not_see_the_ravine(a):
    """The best diagonal preconditioner is a multiple of the identity: the condition number stays a (CL-11)."""
    matrix = np.array([[1 + a, a - 1], [a - 1, 1 + a]])
    start, batch = ravine.ravine(a)
    objective = ravine.OBJECTIVE
    dense = jax.jit(lambda w: curvax.hessian(objective.linearize(w, batch)).to_dense())(start[0])
    np.testing.assert_allclose(dense, matrix, rtol=1e-12)
    conditions = []
    for ratio in np.geomspace(0.1, 10, 41):
        scale = np.diag([1.0, ratio])
        values = np.linalg.eigvalsh(scale @ matrix @ scale)
        conditions.append(values[-1] / values[0])
    np.testing.assert_allclose(min(conditions), a, rtol=1e-6)
    assert np.argmin(conditions) == 20


def test_the_table_of_the_ravine():
    """Newton's method is there in a step, diagonal ones after (a / 4) log 1e6 or more, at the best of rates."""
    a = 15.0
    counts = {}
    for group, name in [
        ("the matrix", "scale_by_dense_curvature, damping 1e-6"),
        ("a number for each parameter", "scale_by_diagonal_curvature"),
        ("first order", "gradient descent, optax.sgd"),
    ]:
        solver = ravine.GROUPS[group][name]
        grid = [(1.0,)] if name == "scale_by_diagonal_curvature" else solver.grid(a)
        count, _ = ravine.counter(solver, limit=200)(a, jnp.array(grid).reshape(len(grid), len(solver.names)))
        counts[name] = int(count)
    expected = np.ceil(np.log(1e-6) / (2 * np.log((a - 1) / (a + 1))))
    assert counts == {
        "scale_by_dense_curvature, damping 1e-6": 1,
        "scale_by_diagonal_curvature": expected,
        "gradient descent, optax.sgd": expected,
    }
