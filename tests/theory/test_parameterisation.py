"""How far a method's steps depend on the parameters that a model is written in (NG-7; Martens 2016, section 5.8).

theta = zeta(gamma). A step d_theta = -alpha B_theta^{-1} grad h and the step d_gamma of the same model in gamma agree
to first order, J d_gamma = d_theta with J the Jacobian of zeta, where J^T B_theta J = B_gamma (equation 5.43).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses
from tests.tolerances import rounding

SIZE = 8
KEY = jax.random.key(11)
DRAW = np.random.default_rng(5)
X = DRAW.normal(size=(60, 2))
BITS = (X @ [[1.0, -2.0], [0.5, 1.0]] + DRAW.normal(size=(60, 2)) > 0).astype(float)
GAMMA = np.array([0.7, -0.4, 0.5, 1.1, 0.9, -0.6, 0.3, 0.8])
MATRIX = np.eye(SIZE) + 0.3 * DRAW.normal(size=(SIZE, SIZE))
OFFSET = DRAW.normal(size=SIZE)
WAVES = DRAW.normal(size=(SIZE, SIZE)) / SIZE**0.5
SWING = 0.4

# The Fisher matrix of the library that draws takes the same draws for the same key, whatever the parameters are.
INVARIANT = {
    "gauss_newton": curvax.GaussNewton(),
    "fisher": curvax.Fisher(),
    "drawn_fisher": curvax.Fisher(num_samples=3),
    "empirical_fisher": curvax.EmpiricalFisher(),
}
every_matrix = pytest.mark.parametrize("name", INVARIANT)


def network(theta, x):
    return jnp.tanh(x @ theta[:4].reshape(2, 2)) @ theta[4:].reshape(2, 2)


def affine(gamma):
    return MATRIX @ gamma + OFFSET / 10


def smooth(gamma):
    """Invertible, as the Jacobian is I plus a matrix of norm below one; its Hessians are known."""
    return gamma + SWING * jnp.sin(WAVES @ gamma)


def smooth_hessians(gamma):
    return -SWING * np.einsum("j,ja,jb->jab", np.sin(WAVES @ gamma), WAVES, WAVES)


def plain(gamma):
    return gamma


def problem(zeta, loss="bits"):
    """The objective in gamma, and its batch."""
    if loss == "bits":
        objective = curvax.Objective(lambda g, x: network(zeta(g), x), losses.sigmoid_binary_cross_entropy())
        return objective, (X, BITS)

    def model(g, x):
        mean, log_variance = jnp.split(network(zeta(g), x), 2, axis=1)
        return mean, log_variance

    return curvax.Objective(model, losses.gaussian()), (X, X[:, :1] * 2 - 1)


def parts(zeta, gamma, curvature, loss="bits"):
    """The gradient and the matrix B in gamma."""
    objective, batch = problem(zeta, loss)
    _, gradient, at = objective.value_and_grad(gamma, batch)
    return gradient, curvature.at(at, KEY).to_dense()


def step(zeta, gamma, curvature, rate, damping=None, loss="bits"):
    """-alpha (B + damping)^{-1} grad."""
    gradient, matrix = parts(zeta, gamma, curvature, loss)
    return -rate * jnp.linalg.solve(matrix if damping is None else matrix + damping, gradient)


def path(zeta, gamma, curvature, rate, count, damping=None):
    def one(gamma, _):
        new = gamma + step(zeta, gamma, curvature, rate, damping)
        return new, new

    return jax.lax.scan(one, jnp.asarray(gamma), length=count)[1]


@every_matrix
@pytest.mark.parametrize("loss", ["bits", "gaussian"])
def test_the_matrix_of_new_parameters_is_pulled_back_by_their_jacobian(name, loss):
    """Equation 5.43 holds for E[J_f^T A J_f] with any A, also a singular one, as that of the empirical Fisher is."""

    @jax.jit
    def compute(gamma):
        pulled = jax.jacfwd(smooth)(gamma)
        there, here = (parts(*where, INVARIANT[name], loss) for where in ((smooth, gamma), (plain, smooth(gamma))))
        return there, (pulled.T @ here[0], pulled.T @ here[1] @ pulled)

    for got, expected in zip(*compute(GAMMA), strict=True):
        np.testing.assert_allclose(got, expected, atol=rounding(jnp.float64, 2000, scale=float(np.abs(expected).max())))


@every_matrix
def test_under_affine_maps_whole_trajectories_are_the_same(name):
    @jax.jit
    def compute(gamma):
        there = path(affine, gamma, INVARIANT[name], 0.03, 20)
        here = path(plain, affine(gamma), INVARIANT[name], 0.03, 20)
        return jax.vmap(affine)(there), here, jax.vmap(lambda theta: parts(plain, theta, INVARIANT[name])[1])(here)

    there, here, matrices = compute(GAMMA)
    assert np.linalg.norm(here[-1] - affine(GAMMA)) > 0.5
    condition = np.linalg.cond(matrices).max() * np.linalg.cond(MATRIX) ** 2
    tolerance = rounding(jnp.float64, 1000, scale=float(np.abs(here).max()), condition=condition)
    assert tolerance < 1e-6
    np.testing.assert_allclose(there, here, atol=tolerance)


@every_matrix
def test_under_smooth_maps_a_step_differs_by_second_order_within_the_bound_of_the_theorem(name):
    """Theorem 9, where |d^T H d| is at most ||H|| ||d||^2 and not half of that."""
    rates = 2.0 ** -np.arange(12)

    @jax.jit
    def compute(gamma):
        there = jax.vmap(lambda rate: step(smooth, gamma, INVARIANT[name], rate))(rates)
        here = jax.vmap(lambda rate: step(plain, smooth(gamma), INVARIANT[name], rate))(rates)
        return there, here, jax.vmap(lambda d: smooth(gamma + d))(there) - smooth(gamma) - here

    there, here, gaps = map(np.asarray, compute(GAMMA))
    jacobian = np.eye(SIZE) + SWING * np.cos(WAVES @ GAMMA)[:, None] * WAVES
    np.testing.assert_allclose(there @ jacobian.T, here, rtol=1e-7, atol=1e-9 * np.abs(here).max())
    slopes = np.diff(np.log2(np.linalg.norm(gaps, axis=1)))
    np.testing.assert_allclose(slopes[7:], -2, atol=0.05)
    largest = SWING * np.linalg.norm(WAVES, axis=1) ** 2  # C, for each component
    for d, gap in zip(there, np.abs(gaps), strict=True):
        curved = [np.abs(np.einsum("jab,a,b->j", smooth_hessians(GAMMA + c * d), d, d)) for c in np.linspace(0, 1, 201)]
        assert np.all(gap <= (1 + 1e-3) * np.max(curved, axis=0) / 2)  # the c of Taylor's theorem is on no grid
        assert np.all(gap <= largest * (d @ d) / 2)


def test_as_printed_the_bound_on_a_quadratic_form_is_half_of_what_it_takes():
    """Section 5.8 has |d^T H d| <= 1/2 ||H|| ||d||^2; the identity has twice that, and many random forms have more."""
    draw = np.random.default_rng(0)
    ratios = []
    for _ in range(2000):
        half = draw.normal(size=(2, 2))
        matrix, d = half + half.T, draw.normal(size=2)
        ratios.append(abs(d @ matrix @ d) / (np.linalg.norm(matrix, 2) * (d @ d)))
    assert max(ratios) <= 1 + 1e-12
    assert max(ratios) > 0.999
    assert np.mean(np.array(ratios) > 0.5) > 0.4


def test_under_smooth_maps_paths_meet_as_the_rate_falls():
    """Corollary 10: after one unit of time the paths differ by O(alpha), and those of gradient descent by O(1)."""

    @functools.partial(jax.jit, static_argnums=1)
    def compute(gamma, count):
        natural, rate = curvax.Fisher(), 1 / count
        there, here = path(smooth, gamma, natural, rate, count), path(plain, smooth(gamma), natural, rate, count)

        def descend(zeta, gamma):
            def one(gamma, _):
                return gamma - 5 * rate * parts(zeta, gamma, natural)[0], None

            return jax.lax.scan(one, jnp.asarray(gamma), length=count)[0]

        plain_gap = smooth(descend(smooth, gamma)) - descend(plain, smooth(gamma))
        return jnp.linalg.norm(smooth(there[-1]) - here[-1]), jnp.linalg.norm(plain_gap)

    gaps, others = np.array([compute(GAMMA, count) for count in (16, 32, 64, 128)]).T
    np.testing.assert_allclose(np.diff(np.log2(gaps))[1:], -1, atol=0.1)
    assert gaps[-1] < 0.1 * others[-1]
    np.testing.assert_allclose(np.diff(np.log2(others)), 0, atol=0.05)


def test_the_hessian_of_new_parameters_has_another_term():
    """B_gamma = J^T H J + sum_j [grad h]_j H_{zeta_j}: none where zeta is affine or the gradient vanishes."""

    @jax.jit
    def compute(gamma):
        theta, pulled = smooth(gamma), jax.jacfwd(smooth)(gamma)
        there, (gradient, here) = (parts(*w, curvax.Hessian()) for w in ((smooth, gamma), (plain, theta)))
        return there[1], pulled.T @ here @ pulled, gradient, pulled

    matrix, pulled, gradient, jacobian = map(np.asarray, compute(GAMMA))
    extra = np.einsum("j,jab->ab", gradient, smooth_hessians(GAMMA))
    np.testing.assert_allclose(matrix, pulled + extra, atol=rounding(jnp.float64, 2000, scale=np.abs(matrix).max()))
    assert np.linalg.norm(extra) > 0.05 * np.linalg.norm(pulled)
    direction = np.linalg.solve(pulled, jacobian.T @ gradient), np.linalg.solve(matrix, jacobian.T @ gradient)
    cosine = direction[0] @ direction[1] / np.prod([np.linalg.norm(d) for d in direction])
    assert abs(cosine) < 0.99

    @jax.jit
    def affine_steps(gamma):
        newton = curvax.Hessian()
        return MATRIX @ step(affine, gamma, newton, 1.0), step(plain, affine(gamma), newton, 1.0)

    np.testing.assert_allclose(*affine_steps(GAMMA), rtol=1e-8)


def test_as_printed_the_condition_for_the_hessian_is_not_necessary():
    """Section 5.8.1 asks for the other term to be J^T H J or zero. Any multiple will do, but -1: here it is 2/3.

    h = 1/2 ||theta - 1||^2 with theta = exp(gamma) at theta = (3, 3).
    """
    objective = curvax.Objective(lambda g, x: x @ jnp.exp(g), losses.squared_error(), select=lambda x: (x, jnp.ones(2)))

    @jax.jit
    def compute(gamma):
        _, gradient, at = objective.value_and_grad(gamma, jnp.eye(2))
        return gradient, curvax.hessian(at).to_dense()

    theta = np.array([3.0, 3.0])
    gradient, matrix = compute(np.log(theta))
    pulled = np.diag(theta**2) / 2  # the objective is the mean over two cases
    np.testing.assert_allclose(matrix - pulled, 2 / 3 * pulled, rtol=1e-12)
    # J d_gamma is parallel to d_theta = 1 - theta, of which it is 3/5.
    np.testing.assert_allclose(theta * -np.linalg.solve(matrix, gradient), 3 / 5 * (1 - theta), rtol=1e-12)


def test_as_printed_a_smooth_invertible_map_may_have_no_invertible_jacobian():
    """Section 5.8: "J_zeta is invertible (since zeta is)". theta = gamma^3 is, and at 0 F vanishes."""
    objective, batch = curvax.Objective(lambda g, x: x * g**3, losses.squared_error()), (jnp.ones(1), jnp.ones(1))
    matrix = jax.jit(lambda g: curvax.fisher(objective.linearize(g, batch)).to_dense())(jnp.zeros(()))
    np.testing.assert_array_equal(matrix, 0)


def test_damping_keeps_the_invariance_only_where_it_changes_as_a_metric_does():
    """Tikhonov damping is that of theta by lambda C^T C with C = J^{-1}; Marquardt's sees no change of scales."""
    natural, strength = curvax.Fisher(), 0.05
    inverse = np.linalg.inv(MATRIX)
    scales = np.exp(np.linspace(-2, 2, SIZE))

    def rescaled(gamma):
        return scales * gamma

    def marquardt(zeta, gamma):
        return strength * jnp.diag(jnp.diag(parts(zeta, gamma, natural)[1]))

    @jax.jit
    def compute(gamma):
        theta = affine(gamma)
        there = MATRIX @ step(affine, gamma, natural, 1.0, strength * jnp.eye(SIZE))
        same, metric = (step(plain, theta, natural, 1.0, strength * d) for d in (jnp.eye(SIZE), inverse.T @ inverse))
        theta = rescaled(gamma)
        scaled = scales * step(rescaled, gamma, natural, 1.0, marquardt(rescaled, gamma))
        mixed = MATRIX @ step(affine, gamma, natural, 1.0, marquardt(affine, gamma))
        unscaled, unmixed = (
            step(plain, z(gamma), natural, 1.0, marquardt(plain, z(gamma))) for z in (rescaled, affine)
        )
        return (there, same, metric), (scaled, unscaled), (mixed, unmixed)

    (there, same, metric), scaled, (mixed, unmixed) = compute(GAMMA)
    np.testing.assert_allclose(there, metric, rtol=1e-9)
    np.testing.assert_allclose(*scaled, rtol=1e-9)
    for one, other in ((there, same), (mixed, unmixed)):
        assert np.linalg.norm(one - other) > 0.05 * np.linalg.norm(other)
