"""Natural gradient against dense solves; its bound on the divergence; its invariance (NG-3, NG-4, NG-5, NG-7)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from tests.oracles import dense_fisher
from tests.problems import problem

GOAL, PARAMS, DATA = problem("mlp")[1:]


def flat(tree):
    return np.asarray(curvax.trees.ravel(tree))


def run(tx, params=PARAMS, goal=GOAL, data=DATA, steps=1):
    @jax.jit
    def step(params, state):
        _, gradient, at = goal.value_and_grad(params, data)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, updates

    state, updates = tx.init(params), None
    for _ in range(steps):
        params, state, updates = step(params, state)
    return params, state, updates


def test_a_step_is_the_dense_damped_one_and_the_schedule_counts_steps():
    schedule = optax.exponential_decay(0.5, 1, 0.5)
    tx = curvax.natural_gradient(schedule, damping=0.1, max_iterations=200, tolerance=1e-12)
    params, _, updates = run(tx)
    matrix = np.asarray(dense_fisher(GOAL, PARAMS, DATA)) + 0.1 * np.eye(curvax.trees.size(PARAMS))
    np.testing.assert_allclose(
        flat(updates), -0.5 * np.linalg.solve(matrix, flat(jax.grad(GOAL)(PARAMS, DATA))), rtol=1e-8
    )
    _, _, second = run(tx, steps=2)
    matrix = np.asarray(dense_fisher(GOAL, params, DATA)) + 0.1 * np.eye(len(matrix))
    np.testing.assert_allclose(
        flat(second), -0.25 * np.linalg.solve(matrix, flat(jax.grad(GOAL)(params, DATA))), rtol=1e-7
    )


def test_scale_by_takes_any_vector_and_says_how_well_it_solved():
    tx = curvax.scale_by_natural_gradient(damping=0.1, max_iterations=200, tolerance=1e-12)
    vector = jax.tree.map(jnp.ones_like, PARAMS)
    scaled, state = jax.jit(lambda v, s: tx.update(v, s, PARAMS, at=objective.linearize(PARAMS, DATA)))(
        vector, tx.init(PARAMS)
    )
    matrix = np.asarray(dense_fisher(GOAL, PARAMS, DATA)) + 0.1 * np.eye(curvax.trees.size(PARAMS))
    np.testing.assert_allclose(matrix @ flat(scaled), flat(vector), rtol=1e-9)
    assert state.info.residual < 1e-12
    assert state.info.damping == 0.1


def test_the_bound_on_the_divergence_holds_and_is_the_divergence_for_small_steps():
    bound = 1e-6
    tx = curvax.natural_gradient(damping=0.1, max_divergence=bound, max_iterations=100, tolerance=1e-10)
    params, state, updates = run(tx)
    matrix = np.asarray(dense_fisher(GOAL, PARAMS, DATA))
    np.testing.assert_allclose(flat(updates) @ matrix @ flat(updates) / 2, bound, rtol=1e-9)
    np.testing.assert_allclose(state.info.divergence, bound, rtol=1e-9)

    model = GOAL.terms[0].model_fn
    old, new = (jax.nn.log_softmax(model(p, DATA[0])) for p in (PARAMS, params))
    divergence = jnp.mean(jnp.sum(jnp.exp(new) * (new - old), axis=-1))
    np.testing.assert_allclose(divergence, bound, rtol=0.02)

    wide = curvax.natural_gradient(damping=0.1, max_divergence=1e3, max_iterations=100, tolerance=1e-10)
    free = curvax.natural_gradient(damping=0.1, max_iterations=100, tolerance=1e-10)
    np.testing.assert_allclose(flat(run(wide)[2]), flat(run(free)[2]), rtol=1e-12)


def test_invariance_under_linear_reparameterisation():
    """Undamped and with as many cases as parameters: the step of theta = C phi is C times that of phi (NG-7)."""
    C = jax.random.normal(jax.random.key(5), (3, 3)) + 2 * jnp.eye(3)
    data = (jax.random.normal(jax.random.key(6), (10, 3)), jax.random.randint(jax.random.key(7), (10,), 0, 2))
    loss = curvax.losses.sigmoid_binary_cross_entropy()
    original = curvax.Objective(lambda w, x: jnp.tanh(x @ w), loss)
    changed = curvax.Objective(lambda w, x: jnp.tanh(x @ (C @ w)), loss)
    theta = jnp.array([0.4, -0.3, 0.2])
    exact = {"damping": 1e-12, "max_iterations": 50, "tolerance": 1e-13}
    step = run(curvax.natural_gradient(original, **exact), theta, original, data)[2]
    other = run(curvax.natural_gradient(changed, **exact), jnp.linalg.solve(C, theta), changed, data)[2]
    np.testing.assert_allclose(C @ other, step, rtol=1e-7)


def test_the_empirical_fisher_does_not_do_instead():
    """n = 1, f = theta, one case (0, 0): the exact matrix converges linearly, the empirical one not at all (NG-5)."""
    goal = curvax.Objective(lambda w, x: w * x, curvax.losses.squared_error())
    data = (jnp.ones(1), jnp.zeros(1))
    exact = run(curvax.natural_gradient(0.5, damping=1e-12), jnp.array(1.0), goal, data, steps=20)[0]
    np.testing.assert_allclose(exact, 0.5**20, rtol=1e-6)
    empirical = curvax.natural_gradient(0.5, damping=1e-12, curvature=curvax.EmpiricalFisher())
    iterates = [float(run(empirical, jnp.array(1.0), goal, data, steps=n)[0]) for n in (20, 21, 22)]
    assert max(abs(w) for w in iterates) > 0.1


def test_a_line_search_of_optax_behind_it():
    """The preconditioner composes: optax's backtracking line search decides on the length of the step."""
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20, slope_rtol=1e-2)
    tx = optax.chain(curvax.scale_by_natural_gradient(damping=1e-3), optax.scale(-1.0), search)

    @jax.jit
    def step(params, state):
        value, gradient, at = GOAL.value_and_grad(params, DATA)
        updates, state = tx.update(
            gradient, state, params, at=at, value=value, grad=gradient, value_fn=lambda p, at: GOAL(p, DATA)
        )
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax's line search mixes dtypes where x64 is enabled
        params, state = PARAMS, tx.init(PARAMS)
        losses = [float(GOAL(params, DATA))]
        for _ in range(5):
            params, state = step(params, state)
            losses.append(float(GOAL(params, DATA)))
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
