"""Dense matrices of chains of blocks against the oracles' and against their definitions (KF-1, KF-4, KF-5, KF-21)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.layers import quality
from tests import oracles
from tests.tolerances import rounding

SIZES = (3, 4, 3, 2)
N = 40


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def network(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def problem(loss, **options):
    params = [
        {"kernel": normal(i, m, n) / m**0.5, "bias": normal(10 + i, n) / 2}
        for i, (m, n) in enumerate(itertools.pairwise(SIZES))
    ]
    batch = normal(20, N, SIZES[0]), jax.nn.sigmoid(normal(21, N, SIZES[-1]))
    objective = curvax.Objective(network, loss, **options)
    return objective, params, batch, curvax.find_layers(objective, params, batch)


def tapped_at(objective, layers, params, batch):
    return curvax.tap(layers, objective.linearize(params, batch))


def in_blocks(matrix, params):
    """A matrix in the ravelled parameters, of which each layer's are bias and kernel, in the order of the blocks."""
    order, start = [], 0
    for layer in params:
        bias, kernel = layer["bias"].size, layer["kernel"].size
        order += [*range(start + bias, start + bias + kernel), *range(start, start + bias)]
        start += bias + kernel
    return np.asarray(matrix)[np.ix_(order, order)]


def sizes_of(joint):
    return [a[i].shape[0] * g[i].shape[0] for i, (a, g) in enumerate(zip(joint.inputs, joint.outputs, strict=True))]


def blocks_of(matrix, joint):
    ends = np.cumsum(sizes_of(joint))[:-1]
    return [np.split(row, ends, axis=1) for row in np.split(np.asarray(matrix), ends)]


LOSSES = [curvax.losses.sigmoid_binary_cross_entropy(), curvax.losses.softmax_cross_entropy()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_exact_matrix_is_the_fisher_matrix_without_the_penalty(loss, weighted):
    weights = jnp.linspace(0.0, 2.0, N)
    options = {"example_weights": lambda batch: weights} if weighted else {}
    objective, params, batch, layers = problem(loss, l2=0.1, **options)
    found = jax.jit(lambda p, b: quality.exact_matrix(tapped_at(objective, layers, p, b)))(params, batch)
    exact = in_blocks(oracles.dense_fisher(objective, params, batch), params) - 0.1 * np.eye(len(found))
    np.testing.assert_allclose(found, exact, atol=rounding(jnp.float64, 100 * N, scale=np.abs(exact).max()))


def test_the_exact_matrix_of_draws_and_of_shared_weights():
    """The empirical one of a convolution is the sum over its positions, squared; draws are those of the linear map."""

    def model(kernel, x):
        x = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.sum(jnp.tanh(x), axis=1)

    objective = curvax.Objective(model, curvax.losses.squared_error())
    kernel, batch = normal(0, 2, 2, 3), (normal(1, 5, 6, 2), normal(2, 5, 3))
    layers, key = curvax.find_layers(objective, kernel, batch), jax.random.key(0)
    drawn = curvax.Fisher(num_samples=2)

    @jax.jit
    def compute(kernel, batch):
        at = objective.linearize(kernel, batch)
        tapped = curvax.tap(layers, at)
        (block,) = layers.treatment.kronecker
        empirical = quality.exact_matrix(tapped, curvature=curvax.EmpiricalFisher())
        sampled = quality.exact_matrix(tapped, key=key, curvature=drawn)
        basis = jnp.eye(kernel.size).reshape(-1, *kernel.shape)
        product = jax.vmap(lambda v: block.to_matrices(drawn.at(at, key)(v)).reshape(-1))(basis)
        return empirical, sampled, product, jax.vmap(lambda v: block.to_matrices(v).reshape(-1))(basis)

    empirical, sampled, product, order = compute(kernel, batch)
    exact = order.T @ oracles.dense_empirical_fisher(objective, kernel, batch) @ order
    tolerance = rounding(jnp.float64, 1000, scale=float(jnp.abs(exact).max()))
    np.testing.assert_allclose(empirical, exact, atol=tolerance)
    np.testing.assert_allclose(sampled, order.T @ product, atol=tolerance)
    with pytest.raises(ValueError, match="5 positions share the weights of block"):
        jax.eval_shape(lambda k, b: quality.cumulant_bound(tapped_at(objective, layers, k, b)), kernel, batch)


def test_every_block_is_the_product_of_its_two_moments():
    objective, params, batch, layers = problem(LOSSES[0])
    compute = jax.jit(lambda p, b: quality.joint_factors(tapped_at(objective, layers, p, b)))
    joint = compute(params, batch)
    inputs, cotangents = moments(params, batch)
    for i, j in itertools.product(range(3), repeat=2):
        a = inputs[i].T @ inputs[j] / N
        g = np.einsum("nco,ncp->op", cotangents[i], cotangents[j]) / N
        np.testing.assert_allclose(joint.inputs[i][j], a, atol=rounding(jnp.float64, 10 * N, scale=10))
        np.testing.assert_allclose(joint.outputs[i][j], g, atol=rounding(jnp.float64, 10 * N, scale=10))
        block = blocks_of(quality.khatri_rao(joint), joint)[i][j]
        np.testing.assert_allclose(block, np.kron(joint.inputs[i][j], joint.outputs[i][j]), rtol=1e-14)


def moments(params, batch):
    """a of every layer with its one, and g = J^T sqrt(p (1 - p)) of every output, by hand."""
    inputs, x = [], np.asarray(batch[0])
    for i, layer in enumerate(params):
        inputs.append(np.concatenate([x, np.ones((N, 1))], axis=1))
        s = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        x = np.tanh(s) if i < len(params) - 1 else s
    p = 1 / (1 + np.exp(-x))
    g = np.sqrt(p * (1 - p))[:, :, None] * np.eye(SIZES[-1])
    cotangents = [g]
    for layer, a in zip(params[:0:-1], inputs[:0:-1], strict=True):
        g = (g @ np.asarray(layer["kernel"]).T) * (1 - a[:, None, :-1] ** 2)
        cotangents.insert(0, g)
    return inputs, cotangents


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_both_approximations_agree_with_f_tilde_and_their_inverses_have_no_other_blocks(gamma):
    objective, params, batch, layers = problem(LOSSES[0])

    @jax.jit
    def compute(params, batch):
        joint = quality.damped(quality.joint_factors(tapped_at(objective, layers, params, batch)), gamma)
        matrices = (quality.block_diagonal(joint), quality.block_tridiagonal(joint))
        inverses = (quality.block_diagonal_inverse(joint), quality.block_tridiagonal_inverse(joint))
        return joint, quality.khatri_rao(joint), matrices, inverses

    joint, tilde, matrices, inverses = jax.tree.map(np.asarray, compute(params, batch))
    for reach, (matrix, inverse) in enumerate(zip(matrices, inverses, strict=True)):
        # Of the solves with single factors, and of the sums of products behind them.
        factors = [np.linalg.cond(grid[i][i]) for grid in (joint.inputs, joint.outputs) for i in range(3)]
        tolerance = rounding(jnp.float64, len(tilde), scale=np.abs(tilde).max(), condition=max(factors))
        solved = rounding(jnp.float64, len(tilde), scale=np.linalg.norm(inverse, 2), condition=np.linalg.cond(matrix))
        np.testing.assert_allclose(np.linalg.inv(matrix), inverse, atol=solved)
        for i, j in itertools.product(range(3), repeat=2):
            own, other = (blocks_of(m, joint)[i][j] for m in (tilde, matrix))
            if abs(i - j) <= reach:
                np.testing.assert_allclose(other, own, atol=tolerance)
            else:
                assert not np.any(blocks_of(inverse, joint)[i][j])
        assert np.all(np.linalg.eigvalsh(inverse) > 0)


def test_damping_is_on_the_factors_of_single_blocks_alone():
    objective, params, batch, layers = problem(LOSSES[0])
    joint = jax.jit(lambda p, b: quality.joint_factors(tapped_at(objective, layers, p, b)))(params, batch)
    found = jax.jit(quality.damped)(joint, 0.3)
    for i in range(3):
        a, g = np.asarray(joint.inputs[i][i]), np.asarray(joint.outputs[i][i])
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
        np.testing.assert_allclose(found.inputs[i][i], a + pi * 0.3 * np.eye(len(a)), rtol=1e-13)
        np.testing.assert_allclose(found.outputs[i][i], g + 0.3 / pi * np.eye(len(g)), rtol=1e-13)
    np.testing.assert_array_equal(found.inputs[0][1], joint.inputs[0][1])


def test_a_chain_is_named_in_its_own_order_and_in_part():
    """The middle blocks of a network, and an order that is not the one of the leaves."""
    objective, params, batch, layers = problem(LOSSES[0])

    @jax.jit
    def compute(params, batch):
        tapped = tapped_at(objective, layers, params, batch)
        functions = (quality.exact_matrix, lambda *a: quality.khatri_rao(quality.joint_factors(*a)))
        functions += (quality.cumulant_bound,)
        return quality.joint_factors(tapped), [[f(tapped), f(tapped, (2, 0))] for f in functions]

    joint, pairs = compute(params, batch)
    for whole, part in pairs:
        blocks = blocks_of(whole, joint)
        np.testing.assert_allclose(part, np.block([[blocks[i][j] for j in (2, 0)] for i in (2, 0)]), atol=1e-13)
    means = quality.block_means(pairs[0][0], joint)
    np.testing.assert_allclose(means[1, 2], np.abs(blocks_of(pairs[0][0], joint)[1][2]).mean(), rtol=1e-12)


def test_what_is_no_link_of_a_chain_is_refused_by_name():
    def model(params, x):
        return jnp.tanh(x @ params["twice"]) @ params["twice"] @ params["once"]

    objective = curvax.Objective(model, curvax.losses.squared_error())
    params, batch = {"twice": normal(0, 3, 3), "once": normal(1, 3, 2)}, (normal(2, N, 3), normal(3, N, 2))
    layers = curvax.find_layers(objective, params, batch)

    def compute(params, batch, chain):
        return quality.joint_factors(tapped_at(objective, layers, params, batch), chain).inputs

    with pytest.raises(ValueError, match="block 'twice' is no link of a chain: it has 1 matrices in 2 uses"):
        jax.eval_shape(lambda p, b: compute(p, b, None), params, batch)
    assert jax.eval_shape(lambda p, b: compute(p, b, (0,)), params, batch)[0][0].shape == (3, 3)


def test_all_blocks_are_in_the_order_of_the_program():
    def model(params, x):
        return jnp.tanh(x @ params["z"]) @ params["a"]

    objective = curvax.Objective(model, curvax.losses.squared_error())
    params, batch = {"z": normal(0, 4, 3), "a": normal(1, 3, 2)}, (normal(2, N, 4), normal(3, N, 2))
    layers = curvax.find_layers(objective, params, batch)
    joint = jax.eval_shape(lambda p, b: quality.joint_factors(tapped_at(objective, layers, p, b)), params, batch)
    assert [grid[0][1].shape for grid in joint] == [(4, 3), (3, 2)]


def test_blocks_of_different_positions_have_no_joint_factors():
    def model(params, x):
        return jnp.sum(jnp.tanh(x @ params["steps"]), axis=1) @ params["head"]

    objective = curvax.Objective(model, curvax.losses.squared_error())
    params, batch = {"steps": normal(0, 3, 3), "head": normal(1, 3, 2)}, (normal(2, N, 5, 3), normal(3, N, 2))
    layers = curvax.find_layers(objective, params, batch)

    def compute(params, batch, function):
        return function(tapped_at(objective, layers, params, batch))

    with pytest.raises(ValueError, match=r"joint_factors: .* 'steps' 5, 'head' 1"):
        jax.eval_shape(lambda p, b: compute(p, b, quality.joint_factors), params, batch)
    exact = jax.jit(lambda p, b: compute(p, b, quality.exact_matrix))(params, batch)
    np.testing.assert_allclose(exact[:9, :9], oracles.dense_fisher(objective, params, batch)[6:, 6:], atol=1e-12)
