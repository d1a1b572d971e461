"""Matrix momentum against a dense loop, and what it is on quadratics (CL-3)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.oracles import dense_ggn
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, run

GOAL, PARAMS, DATA = problem("mlp")[1:]
LINE = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())


def chain(alpha=1.0, **options):
    return optax.chain(curvax.scale_by_matrix_momentum(**options), optax.scale_by_learning_rate(alpha))


@pytest.mark.parametrize("moved_by", ["new", "old"])
def test_a_run_is_equation_3_6_with_damping(moved_by):
    alpha, eta, damping, delta = 0.3, 0.2, 0.05, 0.0
    for taken in run(chain(alpha, inner_rate=eta, damping=damping, moved_by=moved_by), GOAL, PARAMS, DATA, 4):
        matrix = np.asarray(dense_ggn(GOAL, taken.before, DATA)) + damping * np.eye(flat(PARAMS).size)
        g = gradient(GOAL, taken.before, DATA)
        old, delta = delta, delta - eta * (alpha * g + matrix @ (delta + np.zeros(g.size)))
        np.testing.assert_allclose(flat(taken.updates), delta if moved_by == "new" else old + 0 * g, atol=1e-12)


def test_without_a_rate_each_residual_takes_its_best_step_on_the_model():
    damping, m = 0.1, np.zeros(flat(PARAMS).size)
    for taken in run(chain(damping=damping), GOAL, PARAMS, DATA, 3):
        matrix = np.asarray(dense_ggn(GOAL, taken.before, DATA)) + damping * np.eye(m.size)
        residual = gradient(GOAL, taken.before, DATA) - matrix @ m
        m = m + residual @ residual / (residual @ matrix @ residual) * residual
        np.testing.assert_allclose(flat(taken.updates), -m, rtol=1e-8, atol=1e-12)


def quadratic(seed=0, size=4, examples=9):
    """Data, the Hessian and the minimum of 1/2 mean (x w - y)^2."""
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(examples, size)), draw.normal(size=(examples, 1))
    return (jnp.asarray(x), jnp.asarray(y)), x.T @ x / examples, np.linalg.lstsq(x, y)[0][:, 0]


@pytest.mark.parametrize("moved_by", ["old", "new"])
@pytest.mark.parametrize("damping", [0.0, 0.6])
def test_on_a_quadratic_it_is_momentum_of_one_minus_eta_lambda(moved_by, damping):
    """Classical by the old delta, from a start with delta = 0 a step later, and Nesterov's by the new one."""
    data, hessian, minimum = quadratic()
    eta = 0.9 / np.linalg.eigvalsh(hessian)[-1]
    mu, w, v = 1 - eta * damping, np.zeros(4), np.zeros(4)
    history = run(chain(inner_rate=eta, damping=damping, moved_by=moved_by), LINE, jnp.zeros((4, 1)), data, 12)
    for k, taken in enumerate(history):
        np.testing.assert_allclose(flat(taken.before), w, atol=1e-12)
        if moved_by == "new":
            v = mu * v - eta * hessian @ (w + v - minimum)
        elif k > 0:
            v = mu * v - eta * hessian @ (w - minimum)
        w = w + v


def radius(hessian, eta, alpha, moved_by):
    """The spectral radius of the iteration (theta, delta) on a quadratic, without damping."""
    size = len(hessian)
    bend = np.eye(size) - eta * hessian
    if moved_by == "old":
        blocks = [[np.eye(size), np.eye(size)], [-eta * alpha * hessian, bend]]
    else:
        blocks = [[np.eye(size) - eta * alpha * hessian, bend], [-eta * alpha * hessian, bend]]
    return np.max(np.abs(np.linalg.eigvals(np.block(blocks))))


def test_friction_of_the_curvature_alone_does_not_accelerate():
    """By the old delta it never comes to rest with alpha = 1; the best of all settings is slower than gradient descent.

    Momentum proper has 1 - 2 / (sqrt(kappa) + 1) = 0.82 for kappa = 100, gradient descent 0.980, and this 0.990.
    """
    hessian = np.diag(np.geomspace(0.01, 1.0, 6))
    for eta in (0.3, 1.0, 1.2):
        np.testing.assert_allclose(radius(hessian, eta, 1.0, "old"), 1.0, rtol=1e-7)
        # |r|^2 = 1 - eta lambda for complex pairs.
        np.testing.assert_allclose(radius(hessian, eta, 1.0, "new"), np.sqrt(1 - eta * 0.01), rtol=1e-9)
    grid = [(eta, alpha) for eta in np.linspace(0.05, 3.95, 79) for alpha in np.geomspace(1e-3, 4, 80)]
    best = {moved: min(radius(hessian, eta, alpha, moved) for eta, alpha in grid) for moved in ("old", "new")}
    for moved in ("old", "new"):
        assert 99 / 101 < best[moved] < 1
        np.testing.assert_allclose(1 - best[moved], 1 / 100, rtol=0.1)


def test_the_fixed_point_is_the_damped_newton_step_and_conjugate_gradients_are_there_first():
    """With B and g held, by eq. 3.7 in the Krylov space of B and g, in which CG is optimal."""
    data, hessian, _ = quadratic(1)
    w, damping = jnp.ones((4, 1)), 0.2
    damped, g = hessian + damping * np.eye(4), gradient(LINE, w, data)

    @jax.jit
    def held(w):
        tx = curvax.scale_by_matrix_momentum(1 / np.linalg.eigvalsh(damped)[-1], damping=damping)
        _, grads, at = LINE.value_and_grad(w, data)

        def step(state, _):
            updates, state = tx.update(grads, state, w, at=at)
            return state, updates

        return jax.lax.scan(step, tx.init(w), length=400)[1]

    iterates = np.asarray(held(w))[..., 0]
    np.testing.assert_allclose(iterates[-1], np.linalg.solve(damped, g), rtol=1e-8)
    model = [x @ damped @ x / 2 - g @ x for x in iterates]
    krylov = np.stack([np.linalg.matrix_power(damped, k) @ g for k in range(4)], axis=1)
    for k in range(1, 4):
        basis = np.linalg.qr(krylov[:, :k])[0]
        assert np.linalg.norm(iterates[k - 1] - basis @ (basis.T @ iterates[k - 1])) < 1e-9
        best = basis @ np.linalg.solve(basis.T @ damped @ basis, basis.T @ g)
        assert best @ damped @ best / 2 - g @ best <= model[k - 1] + 1e-12


def test_an_indefinite_matrix_needs_a_rate():
    with pytest.raises(ValueError, match="may be indefinite, so that no inner_rate is the best"):
        curvax.scale_by_matrix_momentum(curvature=curvax.Hessian())
    run(chain(inner_rate=0.1, curvature=curvax.Hessian()), GOAL, PARAMS, DATA)
