"""minSR and SPRING on a chain of spins whose ground state is known from a dense diagonalisation.

The chain of n spins in a field f across it, H = -sum_j Z_j Z_{j+1} - f sum_j (cos(phi_j) X_j + sin(phi_j) Y_j), is a
rotation of that with phi = 0: the same energies, and a ground state whose amplitudes have phases where phi is not 0.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax


@pytest.fixture(autouse=True)
def _promotion():
    """Complex and real numbers meet."""
    with jax.numpy_dtype_promotion("standard"):
        yield


SPINS = 5
STATES = np.array(list(itertools.product([1.0, -1.0], repeat=SPINS)))


def hamiltonian(phases, field=1.5):
    matrix = np.diag(-np.sum(STATES * np.roll(STATES, 1, axis=1), axis=1)).astype(complex)
    for row, state in enumerate(STATES):
        for spin, phase in enumerate(phases):
            flipped = state * np.where(np.arange(SPINS) == spin, -1, 1)
            column = int(np.flatnonzero(np.all(flipped == STATES, axis=1))[0])
            matrix[row, column] -= field * np.exp(-1j * phase * state[spin])
    return matrix if np.any(phases) else matrix.real


def modulus(params, x):
    return jnp.sum(jnp.log(jnp.cosh(x @ params["w"] + params["b"])), axis=1)


def amplitude(params, x):
    return jax.lax.complex(modulus(params, x), jnp.tanh(x @ params["u"]) @ params["v"])


CHAINS = {
    "real": (modulus, hamiltonian(np.zeros(SPINS))),
    "complex": (amplitude, hamiltonian(np.linspace(0.2, 0.8, SPINS))),
}


def parameters(model):
    generator = np.random.default_rng(0)
    shapes = {"w": (SPINS, SPINS), "b": (SPINS,)}
    if model is amplitude:
        shapes |= {"u": (SPINS, 4), "v": (4,)}
    return {name: jnp.asarray(0.1 * generator.normal(size=shape)) for name, shape in shapes.items()}


def objective_of(model):
    """Configurations and their weights; no loss, as the gradient comes from local energies."""
    loss = curvax.losses.curvature_only(curvax.losses.squared_error())
    return curvax.Objective(
        model, loss, select=lambda batch: (batch["x"], None), example_weights=lambda batch: batch["weights"]
    )


def local_energies(model, matrix, params):
    """(H psi)(s) / psi(s) for all states s, and the logarithms of their probabilities."""
    log_psi = model(params, jnp.asarray(STATES))
    psi = jnp.exp(log_psi - jnp.max(log_psi.real))
    return (jnp.asarray(matrix) @ psi) / psi, jax.nn.log_softmax(2 * log_psi.real)


def energy_gradient(at, weights, energies):
    """2 Re <O^* (E - <E>)>, from the same linearisation as the curvature."""
    mean = jnp.mean(weights * energies)
    return at.jacobian_transpose_product(2 * weights * (energies - mean) / len(energies))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("momentum", "samples"), [(None, None), (0.8, 64)], ids=["minSR summed", "SPRING sampled"])
def test_the_energy_reaches_that_of_the_ground_state(chain, momentum, samples):
    model, matrix = CHAINS[chain]
    objective, params = objective_of(model), parameters(model)
    tx = optax.chain(curvax.scale_by_sample_space(damping=1e-3, momentum=momentum, centered=True), optax.scale(-0.05))

    def step(carry, key):
        params, state = carry
        energies, log_p = local_energies(model, matrix, params)
        energy = jnp.sum(jnp.exp(log_p) * energies).real
        if samples is None:
            batch = {"x": jnp.asarray(STATES), "weights": len(STATES) * jnp.exp(log_p)}
        else:
            drawn = jax.random.categorical(key, log_p, shape=(samples,))
            batch, energies = {"x": jnp.asarray(STATES)[drawn], "weights": jnp.ones(samples)}, energies[drawn]
        at = objective.linearize(params, batch)
        gradient = energy_gradient(at, batch["weights"], energies)
        updates, state = tx.update(gradient, state, params, at=at)
        return (optax.apply_updates(params, updates), state), (energy, state[0].info.skipped_steps)

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(0), 150))[1]

    energies, skipped = train(params)
    ground = np.linalg.eigvalsh(matrix)[0]
    assert skipped[-1] == 0
    assert np.all(energies > ground - 1e-9)
    assert energies[0] > 0.9 * ground
    assert energies[-1] - ground < 1e-3 * abs(ground)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_steps_are_the_published_ones(chain, method):
    """SPRING's, O^T (O O^T + lambda I + 1 1^T / N)^{-1} (e - mu O d) + mu d, with rows O / sqrt(N) less their mean.

    Complex rows and energies are stacked by real and imaginary part, as in Chen and Heyl 2024; mu = 0 is minSR.
    """
    model, matrix = CHAINS[chain]
    objective, params = objective_of(model), parameters(model)
    damping, momentum = 0.01, 0.9
    tx = curvax.scale_by_sample_space(
        damping=damping, momentum=momentum, centered=True, method=method, max_iterations=300, tolerance=1e-13
    )
    places = np.random.default_rng(1).integers(0, len(STATES), 12)
    batch = {"x": jnp.asarray(STATES[places]), "weights": jnp.ones(12)}

    @jax.jit
    def compute(params):
        energies, _ = local_energies(model, matrix, params)
        energies = energies[places]
        at = objective.linearize(params, batch)
        gradient = energy_gradient(at, batch["weights"], energies)
        state, steps = tx.init(params), []
        for _ in range(2):
            updates, state = tx.update(gradient, state, params, at=at)
            steps.append(curvax.trees.ravel(updates))
        jacobian = jax.jacfwd(model)(params, batch["x"])
        rows = [leaf.reshape(12, -1) for leaf in jax.tree.leaves(jacobian)]
        return steps, jnp.concatenate(rows, axis=1), energies

    steps, rows, energies = compute(params)
    rows, errors = ((x - np.mean(x, axis=0)) / np.sqrt(12) for x in (np.asarray(rows), 2 * np.asarray(energies)))
    ones = np.ones((12, 12)) / 12
    if np.iscomplexobj(rows):
        rows, errors = np.concatenate([rows.real, rows.imag]), np.concatenate([errors.real, errors.imag])
        ones = np.kron(np.eye(2), ones)
    kernel, last = rows @ rows.T + damping * np.eye(len(rows)) + ones, np.zeros(rows.shape[1])
    for step in steps:
        last = rows.T @ np.linalg.solve(kernel, errors - momentum * rows @ last) + momentum * last
        assert np.linalg.norm(step - last) < 1e-8 * np.linalg.norm(last)
