"""EKFAC against the dense curvature in its own basis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax
from curvax import trees
from curvax.layers import ekfac
from tests import oracles
from tests.layers.test_kronecker import answers, check, experts_and_embedding, mlp, normal, scaled_and_added
from tests.problems import problem

L = curvax.losses
EXACT = curvax.GaussNewton()
N = 5


def convolution():
    return problem("convolution")[1:], "error"


def recurrent():
    return problem("recurrent")[1:], "error"


def tied():
    """An embedding and an output head: one-hot rows and cotangents on the same side, with positions."""

    def model(params, tokens):
        return jnp.tanh(params["table"][tokens]) @ params["table"].T

    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 4, (N, 3)))
    return (curvax.Objective(model, L.softmax_cross_entropy()), {"table": normal(0, 4, 3)}, (tokens, tokens)), "error"


def looked_up_often():
    """Rows that an example reads several times, one by a scaled table, with an index outside of it."""

    def model(params, tokens):
        rows = jnp.take(2.0 * params["table"], tokens, axis=0, mode="fill", fill_value=0.0)
        return jnp.sum(jnp.cos(rows), axis=1)

    tokens = jnp.asarray([[0, 0, 2], [3, 9, 3], [1, 2, 3], [2, 2, 2]])
    params = {"table": normal(0, 4, 2)}
    return (curvax.Objective(model, L.squared_error()), params, (tokens, jnp.zeros((4, 2)))), "error"


def two_terms():
    """Of one network, with different numbers of positions and of examples."""

    def model(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    terms = [
        curvax.Term(model, L.squared_error(), select=lambda batch: batch[0], weight=2.0),
        curvax.Term(model, L.softmax_cross_entropy(), select=lambda batch: batch[1]),
    ]
    params = {"v": normal(0, 4, 2), "w": normal(1, 3, 4)}
    batch = (normal(2, N, 3, 3), normal(3, N, 3, 2)), (normal(4, 2 * N, 3), jnp.arange(2 * N) % 2)
    return (curvax.Objective.from_terms(*terms), params, batch), "error"


PROBLEMS = [mlp, convolution, recurrent, tied, looked_up_often, scaled_and_added, experts_and_embedding, two_terms]


def eigen_maps(objective, params, batch, fallback, curvature=EXACT):
    """K-FAC's map and EKFAC's, both by eigenvectors, and the dense Gauss-Newton matrix."""
    layers = curvax.find_layers(objective, params, batch, fallback=fallback)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=curvature)
        K = curvax.kronecker_map(layers, factors, params).decomposed()
        E = K.with_values(curvax.layers.eigenvalue_corrections(tapped, K.bases, curvature=curvature))
        return K, E, K.to_dense(), E.to_dense(), oracles.dense_ggn(objective, params, batch)

    return layers, compute(params, batch)


def entries_of(layers, params):
    """For each matrix of each block the entries of the ravelled parameters that it holds."""
    found = []
    for block in layers.treatment.kronecker:
        for i in range(block.shape[0]):
            ones = jnp.zeros(block.shape).at[i].set(1.0)
            moved = block.to_params(ones)
            leaves = [np.asarray(moved.get(k, jnp.zeros(s.shape))).ravel() for k, s in enumerate(layers.structs)]
            found.append(np.flatnonzero(np.concatenate(leaves)))
    return found


@pytest.mark.many_compilations("blocks are looked at by small programs")
@pytest.mark.parametrize("make", PROBLEMS)
def test_ekfac_is_never_further_than_kfac(make):
    """In Frobenius norm, block by block; and its residual has no diagonal in the basis of the eigenvectors."""
    (objective, params, batch), fallback = make()
    layers, (_, E, kfac, corrected, exact) = eigen_maps(objective, params, batch, fallback)
    bases = [(np.asarray(_full(a[i])), np.asarray(_full(g[i]))) for a, g in E.bases for i in range(a.shape[0])]
    for own, (q_a, q_g) in zip(entries_of(layers, params), bases, strict=True):
        blocks = [np.asarray(x)[np.ix_(own, own)] for x in (kfac, corrected, exact)]
        distances = [np.linalg.norm(x - blocks[2]) for x in blocks[:2]]
        assert distances[1] <= distances[0] + 1e-12 * np.linalg.norm(blocks[2])
        if len(layers.treatment.kronecker) == 1 and len(own) == len(exact) == q_a.shape[0] * q_g.shape[0]:
            q = np.kron(q_a, q_g)
            np.testing.assert_allclose(np.diag(q.T @ (blocks[1] - blocks[2]) @ q), 0, atol=1e-11)


def _full(q):
    return jnp.diag(q) if q.ndim == 1 else q


def test_ekfac_is_kfac_where_that_is_exact():
    objective = curvax.Objective(lambda p, x: x @ p["w"] + p["b"], L.squared_error())
    params = {"b": normal(0, 2), "w": normal(1, 3, 2)}
    _, (K, E, kfac, corrected, exact) = eigen_maps(objective, params, (normal(2, N, 3), normal(3, N, 2)), "error")
    np.testing.assert_allclose(kfac, exact, atol=1e-12)
    np.testing.assert_allclose(corrected, exact, atol=1e-12)
    np.testing.assert_allclose(E.values[0], K.values[0], atol=1e-12)


@pytest.mark.many_compilations("the squares of the layers' maps are found by small programs of their own")
@pytest.mark.parametrize("make", [mlp, scaled_and_added, experts_and_embedding])
def test_every_answer_is_that_of_the_dense_matrix(make):
    (objective, params, batch), fallback = make()
    _, (_, E, _, dense, _) = eigen_maps(objective, params, batch, fallback)
    vector = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), params)
    key, damping = jax.random.key(1), 0.3
    found = jax.jit(lambda E: answers(E, vector, key, damping))(E)
    noise = np.asarray(trees.ravel(jax.jit(lambda: trees.random_normal(key, params))()))
    check(found, np.asarray(dense), np.asarray(trees.ravel(vector)), noise, damping)


def test_draws_converge_to_the_exact_corrections():
    (objective, params, batch), _ = mlp()
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch, key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=EXACT)
        bases = curvax.kronecker_map(layers, factors, params).decomposed().bases
        drawn = curvax.Fisher(num_samples=4000)
        return (
            curvax.layers.eigenvalue_corrections(tapped, bases, curvature=curvax.Fisher()),
            curvax.layers.eigenvalue_corrections(tapped, bases, key, curvature=drawn),
        )

    for exact, drawn in zip(*compute(params, batch, jax.random.key(0)), strict=True):
        # Six standard errors of 4,000 draws for each example, whose squares deviate by at most a few means.
        assert np.linalg.norm(drawn - exact) < 6 * 3 / np.sqrt(4000) * np.linalg.norm(exact)


# --- the inverse -----------------------------------------------------------------------------------------------------


@pytest.mark.many_compilations("blocks are looked at by small programs")
@pytest.mark.parametrize("make", [mlp, scaled_and_added])
def test_the_inverse_is_that_of_the_map_with_exact_damping(make):
    (objective, params, batch), _ = make()
    layers = curvax.find_layers(objective, params, batch)
    inverse, gamma = curvax.layers.EigenCorrected(damping="exact"), 0.7

    @jax.jit
    def compute(params, batch, vector):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=EXACT)
        prepared = inverse.prepare(layers, factors, gamma, inverse.start(layers))
        K = curvax.kronecker_map(layers, factors, params).decomposed()
        observed = inverse.observe(layers, prepared, tapped, None, curvature=EXACT, count=1)
        E = K.with_values(curvax.layers.eigenvalue_corrections(tapped, K.bases, curvature=EXACT))
        vector = K(vector)  # of the range of L, as gradients are
        blocks = layers.treatment.kronecker
        solutions = []
        for own in (prepared, observed):
            matrices = tuple(block.to_matrices(vector) for block in blocks)
            solved = inverse.apply(layers, own, matrices)
            leaves = {}
            for block, matrix in zip(blocks, solved, strict=True):
                leaves |= block.to_params(matrix)
            solutions.append(trees.ravel([leaves[i] for i in range(len(layers.paths))]))
        expected = (trees.ravel(x.solve(vector, damping=gamma**2)) for x in (K, E))
        return prepared, solutions, tuple(expected)

    prepared, found, expected = compute(params, batch, params)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
    start = jax.eval_shape(lambda: inverse.start(layers))
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), prepared, start)


def test_a_new_basis_takes_the_eigenvalues_along():
    """s' is the diagonal of Q diag(s) Q^T in the new basis Q', and the same again where the basis is the same."""
    (objective, params, batch), _ = mlp()
    layers = curvax.find_layers(objective, params, batch)
    inverse = curvax.layers.EigenCorrected()

    @jax.jit
    def compute(params, batch):
        def factors_of(batch):
            tapped = curvax.tap(layers, objective.linearize(params, batch))
            return tapped, curvax.layers.kronecker_factors(tapped, curvature=EXACT)

        (tapped, first), (_, second) = factors_of(batch), factors_of(jax.tree.map(lambda leaf: leaf[:4], batch))
        old = inverse.prepare(layers, first, 0.1, inverse.start(layers))
        old = inverse.observe(layers, old, tapped, None, curvature=EXACT, count=1)
        return old, inverse.prepare(layers, first, 0.2, old), inverse.prepare(layers, second, 0.1, old)

    old, same, new = compute(params, batch)
    for i, s in enumerate(old.values):
        np.testing.assert_allclose(same.values[i], s, atol=1e-12)
        q, p = (np.kron(x.bases[i][0][0], x.bases[i][1][0]) for x in (old, new))
        matrix = q @ np.diag(np.ravel(s)) @ q.T
        np.testing.assert_allclose(np.ravel(new.values[i]), np.diag(p.T @ matrix @ p), atol=1e-12)
    np.testing.assert_allclose(same.gamma, 0.2, rtol=1e-12)


def test_factored_damping_is_that_of_k_fac_until_something_else_is_observed():
    """On the products of the factors' eigenvalues the inverse is BlockDiagonal's, and redamped as prepared anew."""
    (objective, params, batch), _ = mlp()
    layers = curvax.find_layers(objective, params, batch)
    inverse, of_factors = curvax.layers.EigenCorrected(), curvax.layers.BlockDiagonal()

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=EXACT)
        prepared = inverse.prepare(layers, factors, 0.3, inverse.start(layers))
        matrices = tuple(block.to_matrices(params) for block in layers.treatment.kronecker)
        expected = of_factors.apply(layers, of_factors.prepare(layers, factors, 0.7, None), matrices)
        redamped = inverse.redamp(layers, factors, 0.7, prepared)
        observed = inverse.observe(layers, redamped, tapped, None, curvature=EXACT, count=1)
        found = [inverse.apply(layers, own, matrices) for own in (redamped, observed)]
        return factors, observed, matrices, found, expected

    factors, observed, matrices, (found, corrected), expected = compute(params, batch)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    for place, (a, g) in enumerate(zip(factors.inputs, factors.outputs, strict=True)):
        a, g, v = (np.asarray(x[0]) for x in (a, g, matrices[place]))
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
        q, s = np.kron(*(x[0] for x in observed.bases[place])), np.ravel(observed.values[place])
        added = 0.7 * (np.kron(a, np.eye(len(g))) / pi + np.kron(np.eye(len(a)), g) * pi) + 0.49 * np.eye(v.size)
        dense = np.linalg.solve(q @ np.diag(s) @ q.T + added, v.ravel())
        np.testing.assert_allclose(np.ravel(corrected[place]), dense, rtol=1e-9)


def test_observations_are_averaged_and_what_is_not_finite_is_left_out():
    (objective, params, batch), _ = mlp()
    layers = curvax.find_layers(objective, params, batch)
    inverse = curvax.layers.EigenCorrected()

    @jax.jit
    def compute(params, batches, k):
        tapped = [curvax.tap(layers, objective.linearize(params, b)) for b in batches]
        factors = curvax.layers.kronecker_factors(tapped[0], curvature=EXACT)
        prepared = inverse.prepare(layers, factors, 0.1, inverse.start(layers))
        new = ekfac.corrections_of(tapped[1], prepared.bases, None, EXACT)
        return prepared, new, inverse.observe(layers, prepared, tapped[1], None, curvature=EXACT, count=k, decay=0.75)

    other = normal(8, 6, 4), batch[1]
    for k, keep in ((1, 0.0), (2, 0.5), (10, 0.75)):
        prepared, new, found = compute(params, (batch, other), jnp.asarray(k))
        for a, b, c in zip(prepared.values, new, found.values, strict=True):
            np.testing.assert_allclose(c, keep * a + (1 - keep) * b, atol=1e-12)
    prepared, _, found = compute(params, (batch, (other[0] * jnp.nan, other[1])), jnp.asarray(2))
    jax.tree.map(np.testing.assert_array_equal, found, prepared)


def test_one_position_forms_no_gradients_of_examples():
    """By counting: no array of the traced program is as large as the gradients of all examples of a layer."""
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], L.squared_error())
    params = {"w": jnp.zeros((30, 40)), "v": jnp.zeros((40, 20))}
    batch = jnp.zeros((50, 30)), jnp.zeros((50, 20))
    layers = curvax.find_layers(objective, params, batch)

    def compute(params, batch, key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        bases = tuple((jnp.zeros((1, b.shape[1], b.shape[1])), jnp.zeros((1, *b.shape[2:] * 2))) for b in layers.blocks)
        return curvax.layers.eigenvalue_corrections(tapped, bases, key)

    program = jax.make_jaxpr(compute)(params, batch, jax.random.key(0))
    sizes = [var.aval.size for equation in program.eqns for var in equation.outvars if hasattr(var.aval, "size")]
    assert max(sizes) <= 50 * 40


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_sharded_over_devices_gives_the_same(axis_type, weighted):
    """Factors, corrections and solves, with positions, a bias and a scale; targets drawn beside their examples."""

    def model(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) * params["gain"], axis=1) @ params["v"]

    params = {"b": normal(0, 4), "gain": normal(1, 4), "v": normal(2, 4, 2), "w": normal(3, 3, 4)}
    batch = normal(4, 16, 3, 3), jnp.arange(16) % 2
    weights = (lambda batch: jnp.exp(batch[0][:, 0, 0])) if weighted else None
    objective = curvax.Objective(model, L.softmax_cross_entropy(), example_weights=weights)
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch, key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, key)
        K = curvax.kronecker_map(layers, factors, params).decomposed()
        E = K.with_values(curvax.layers.eigenvalue_corrections(tapped, K.bases, key))
        return factors, K.solve(params, damping=0.1), E.solve(params, damping=0.1)

    expected = compute(params, batch, jax.random.key(0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        result = compute(replicated, sharded, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-11), result, expected)
