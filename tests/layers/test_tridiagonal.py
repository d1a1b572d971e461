"""The block-tridiagonal inverse against the dense matrix it replaces, formed block by block in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from curvax.layers.factors import KroneckerFactors, kronecker_factors
from curvax.layers.inverses import BlockDiagonal
from curvax.layers.tridiagonal import BlockTridiagonal, chains

L = curvax.losses


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def found_layers(model, params, inputs):
    outputs = jax.eval_shape(model, params, inputs)
    objective = curvax.Objective(model, L.squared_error())
    batch = (inputs, jnp.zeros(outputs.shape, outputs.dtype))
    return objective, batch, curvax.find_layers(objective, params, batch)


def mlp(sizes, dtype=np.float64):
    """Layers in an order of their leaves that is not that of the program."""
    names = ["c", "a", "d", "b"][: len(sizes) - 1]

    def model(params, x):
        for name in names[:-1]:
            x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
        return x @ params[names[-1]]["w"]

    params = {
        name: {"b": normal(i, m).astype(dtype), "w": (normal(i + 9, n, m) / np.sqrt(n)).astype(dtype)}
        for i, (name, n, m) in enumerate(zip(names, sizes[:-1], sizes[1:], strict=True))
    }
    del params[names[-1]]["b"]
    return model, params, names


def joint_factors(layers, chain, seed, cases=200, dtype=np.float64):
    """Second moments of correlated rows for the blocks of a chain: together they are a positive definite matrix."""
    rng = np.random.default_rng(seed)
    sides = []
    for axis in (1, 2):
        sizes = {place: layers.treatment.kronecker[place].shape[axis] for place in chain}
        rows, last = {}, rng.normal(size=(cases, 3))
        for place in chain:
            last = last @ rng.normal(size=(last.shape[1], sizes[place])) + 0.5 * rng.normal(size=(cases, sizes[place]))
            rows[place] = last = last / np.std(last)
        sides.append({(i, j): (rows[i].T @ rows[j] / cases).astype(dtype) for i in chain for j in chain})
    inputs, outputs = sides
    pairs = list(itertools.pairwise(chain))
    diagonal = [[side[i, i][None] for i in sorted(chain)] for side in sides]
    factors = KroneckerFactors(
        tuple(diagonal[0]), tuple(diagonal[1]), (), tuple(inputs[p] for p in pairs), tuple(outputs[p] for p in pairs)
    )
    return factors, inputs, outputs


def dense_matrices(chain, inputs, outputs, gamma):
    """(F~ damped on its diagonal blocks, F-hat of Martens 2016, section 6.4.3, the lengths of the blocks).

    F-hat agrees with F~ on the tridiagonal, and its inverse is tridiagonal: blocks further away come from those between
    them, F_ik = F_ij F_jj^{-1} F_jk.
    """
    lengths = {}
    a, g = dict(inputs), dict(outputs)
    for i in chain:
        p, q = inputs[i, i], outputs[i, i]
        pi = np.sqrt((np.trace(p) / len(p)) / (np.trace(q) / len(q)))
        a[i, i], g[i, i] = p + pi * gamma * np.eye(len(p)), q + gamma / pi * np.eye(len(q))
        lengths[i] = len(p) * len(q)
    full = {(i, j): np.kron(a[i, j], g[i, j]) for i in chain for j in chain}
    hat = {(i, i): full[i, i] for i in chain}
    for distance in range(1, len(chain)):
        for start in range(len(chain) - distance):
            i, k = chain[start], chain[start + distance]
            if distance == 1:
                hat[i, k] = full[i, k]
            else:
                j = chain[start + 1]
                hat[i, k] = full[i, j] @ np.linalg.solve(full[j, j], hat[j, k])
            hat[k, i] = hat[i, k].T
    assemble = lambda blocks: np.block([[blocks[i, j] for j in chain] for i in chain])  # noqa: E731
    return assemble(full), assemble(hat), [lengths[i] for i in chain]


def prepared_and_applied(layers, factors, vectors, gamma, inverse=None):
    inverse = BlockTridiagonal() if inverse is None else inverse

    @jax.jit
    def compute(factors, vectors):
        prepared = inverse.prepare(layers, factors, gamma, None)
        return jax.vmap(lambda v: inverse.apply(layers, prepared, v))(vectors)

    return compute(factors, vectors)


@pytest.mark.parametrize(
    ("sizes", "doublings"), [((3, 2), None), ((3, 2, 2), None), ((2, 3, 2, 2), 12), ((2, 2, 3, 2, 1), None)]
)
def test_it_is_the_inverse_of_the_matrix_it_stands_for(sizes, doublings):
    model, params, _ = mlp(sizes)
    _, _, layers = found_layers(model, params, normal(0, 5, sizes[0]))
    (chain,) = chains(layers)
    factors, inputs, outputs = joint_factors(layers, chain, 1)
    tilde, hat, lengths = dense_matrices(chain, inputs, outputs, 0.1)
    shapes = [block.shape for block in layers.treatment.kronecker]
    starts = dict(zip(chain, np.cumsum([0, *lengths[:-1]]), strict=True))
    columns = np.eye(sum(lengths))
    vectors = tuple(
        columns[:, starts[i] : starts[i] + np.prod(shape)].reshape(-1, *shape) for i, shape in enumerate(shapes)
    )
    found = prepared_and_applied(layers, factors, vectors, 0.1, BlockTridiagonal(doublings=doublings))
    inverse = np.concatenate([np.asarray(found[i]).reshape(len(columns), -1) for i in chain], axis=1)
    np.testing.assert_allclose(inverse, np.linalg.inv(hat), atol=1e-9 * np.max(np.abs(inverse)))
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-10 * np.max(np.abs(inverse)))
    assert np.min(np.linalg.eigvalsh(inverse)) > 0
    # What it stands for has the blocks of F~ on the tridiagonal, and its inverse has none off it.
    back, ends = np.linalg.inv(inverse), np.cumsum([0, *lengths])
    for i in range(len(chain)):
        for j in range(len(chain)):
            block = np.s_[ends[i] : ends[i + 1], ends[j] : ends[j + 1]]
            if abs(i - j) <= 1:
                np.testing.assert_allclose(back[block], tilde[block], atol=1e-8)
            else:
                np.testing.assert_allclose(inverse[block], 0, atol=1e-10 * np.max(np.abs(inverse)))


def test_fewer_terms_of_smiths_series_are_a_smaller_definite_matrix():
    sizes = (2, 3, 2, 2)
    model, params, _ = mlp(sizes)
    _, _, layers = found_layers(model, params, normal(0, 5, sizes[0]))
    (chain,) = chains(layers)
    factors, *_ = joint_factors(layers, chain, 1)
    v = tuple(normal(i, 40, *block.shape) for i, block in enumerate(layers.treatment.kronecker))
    ways = [BlockTridiagonal(doublings=number) for number in (1, 3, 6)] + [BlockTridiagonal()]
    forms = []
    for way in ways:
        image = prepared_and_applied(layers, factors, v, 0.1, way)
        forms.append(sum(np.sum(np.asarray(x * y).reshape(40, -1), axis=1) for x, y in zip(v, image, strict=True)))
    assert np.all(forms[0] > 0)
    for fewer, more in itertools.pairwise(forms):
        assert np.all(fewer <= more * (1 + 1e-12))
    np.testing.assert_allclose(forms[2], forms[3], rtol=0.05)
    with pytest.raises(ValueError, match="doublings is 0; it must be at least 1"):
        BlockTridiagonal(doublings=0)


@pytest.mark.many_compilations("biases and maps are looked at while tracing, one equation at a time")
def test_factors_of_a_network_give_the_inverse_of_their_own_joint_matrix():
    """Moments by hand from the rows of a network: with the homogeneous coordinate, in the order of the program."""
    sizes, gamma, cases = (3, 2, 3, 2), 0.2, 12
    model, params, names = mlp(sizes)
    objective, batch, layers = found_layers(model, params, normal(3, cases, 3))
    inverse = BlockTridiagonal()
    pairs = inverse.pairs(layers)
    place = {block.name.split("/")[0]: i for i, block in enumerate(layers.treatment.kronecker)}
    chain = tuple(place[name] for name in names)
    assert chains(layers) == (chain,)
    assert pairs == tuple(itertools.pairwise(chain))
    vectors = tuple(normal(20 + i, *block.shape) for i, block in enumerate(layers.treatment.kronecker))

    @jax.jit
    def compute(params, batch, vectors):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = kronecker_factors(tapped, curvature=curvax.GaussNewton(), pairs=pairs)
        return inverse.apply(layers, inverse.prepare(layers, factors, gamma, None), vectors)

    found = compute(params, batch, vectors)
    x, rows = np.asarray(batch[0]), {}
    jacobian = {}
    for name in names:
        p = jax.tree.map(np.asarray, params[name])
        rows[place[name]] = np.concatenate([x, np.ones((cases, 1))], axis=1) if "b" in p else x
        x = np.tanh(x @ p["w"] + p["b"]) if "b" in p else x @ p["w"]
        jacobian[name] = 1 - x**2 if "b" in p else np.ones_like(x)
    back, of_outputs = np.broadcast_to(np.eye(sizes[-1])[:, None], (sizes[-1], cases, sizes[-1])), {}
    for name in reversed(names):  # a sweep for each output, squared error being its own curvature
        back = back * jacobian[name]
        of_outputs[place[name]] = back
        back = back @ np.asarray(params[name]["w"]).T
    inputs = {(i, j): rows[i].T @ rows[j] / cases for i in chain for j in chain}
    outputs = {(i, j): np.einsum("cni,cnj->ij", of_outputs[i], of_outputs[j]) / cases for i in chain for j in chain}
    _, hat, _ = dense_matrices(chain, inputs, outputs, gamma)
    exact = np.linalg.solve(hat, np.concatenate([np.ravel(vectors[i]) for i in chain]))
    np.testing.assert_allclose(np.concatenate([np.ravel(found[i]) for i in chain]), exact, rtol=1e-8, atol=1e-8)


def test_without_cross_factors_it_is_block_diagonal():
    model, params, _ = mlp((3, 2, 2))
    _, _, layers = found_layers(model, params, normal(0, 5, 3))
    (chain,) = chains(layers)
    factors, _, _ = joint_factors(layers, chain, 2)
    factors = factors._replace(
        cross_inputs=tuple(map(np.zeros_like, factors.cross_inputs)),
        cross_outputs=tuple(map(np.zeros_like, factors.cross_outputs)),
    )
    vectors = tuple(normal(i, 1, *block.shape) for i, block in enumerate(layers.treatment.kronecker))
    found = prepared_and_applied(layers, factors, vectors, 0.3)
    for own, other in zip(found, prepared_and_applied(layers, factors, vectors, 0.3, BlockDiagonal()), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-9)


def test_nearly_singular_float32_factors_give_a_finite_positive_inverse():
    """Neighbours that determine each other, of rank three, with hardly any damping: canonical correlations near one."""
    model, params, _ = mlp((10, 10, 10, 10), np.float32)
    _, _, layers = found_layers(model, params, normal(0, 5, 10).astype(np.float32))
    (chain,) = chains(layers)
    rng = np.random.default_rng(0)
    sides = []
    for axis in (1, 2):
        hidden = rng.normal(size=(50, 3))
        rows = {i: hidden @ rng.normal(size=(3, layers.treatment.kronecker[i].shape[axis])) for i in chain}
        sides.append({(i, j): (rows[i].T @ rows[j] / 50).astype(np.float32) for i in chain for j in chain})
    pairs = list(itertools.pairwise(chain))
    factors = KroneckerFactors(
        *(tuple(side[i, i][None] for i in sorted(chain)) for side in sides),
        (),
        *(tuple(side[pair] for pair in pairs) for side in sides),
    )
    vectors = tuple(rng.normal(size=(4, *block.shape)).astype(np.float32) for block in layers.treatment.kronecker)
    inverse = BlockTridiagonal()

    @jax.jit
    def compute(factors, vectors, gamma):
        prepared = inverse.prepare(layers, factors, gamma, None)
        return jax.vmap(lambda v: inverse.apply(layers, prepared, v))(vectors)

    for gamma in (1e-2, 1e-3, 1e-4):
        found = compute(factors, vectors, gamma)
        assert all(leaf.dtype == np.float32 and np.all(np.isfinite(leaf)) for leaf in found)
        products = sum(np.sum(np.asarray(f) * v, axis=(1, 2, 3)) for f, v in zip(found, vectors, strict=True))
        assert np.all(products > 0)


def tied(params, x):
    x = jnp.tanh(x @ params["a"])
    x = jnp.tanh(jnp.tanh(x @ params["t"]) @ params["t"])
    return jnp.tanh(x @ params["b"]) @ params["c"]


def pooled(params, x):
    """Positions that are pooled away: other numbers of them share the weights."""
    x = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
    return jnp.tanh(x.sum(axis=1) @ params["c"]) @ params["t"]


def scanned(params, x):
    x = jnp.tanh(x @ params["a"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["t"])
    return jnp.tanh(x @ params["b"]) @ params["c"]


def embedded(params, x):
    x = params["t"][jnp.argmax(x, axis=1)]
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


CHAINS = {
    "tied": (tied, (3, 3), (5, 3), [["a"], ["t"], ["b", "c"]]),
    "pooled": (pooled, (3, 3), (5, 4, 3), [["a", "b"], ["c", "t"]]),
    "scanned": (scanned, (2, 3, 3), (5, 3), [["a"], ["t"], ["b", "c"]]),
    "embedded": (embedded, (3, 3), (5, 3), [["t"], ["a", "b", "c"]]),
}


@pytest.mark.many_compilations("biases and maps are looked at while tracing, one equation at a time")
@pytest.mark.parametrize("name", CHAINS)
def test_chains_join_neighbours_whose_gradients_are_of_the_same_cases(name):
    model, shape, inputs, expected = CHAINS[name]
    params = {key: normal(i, 3, 3) for i, key in enumerate("abc")} | {"t": normal(3, *shape)}
    objective, batch, layers = found_layers(model, params, normal(9, *inputs))
    blocks = layers.treatment.kronecker
    assert [[blocks[place].name for place in chain] for chain in chains(layers)] == expected
    # Blocks outside of chains are solved with by themselves.
    inverse = BlockTridiagonal()
    vectors = tuple(normal(i, *block.shape) for i, block in enumerate(blocks))

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = kronecker_factors(tapped, curvature=curvax.GaussNewton(), pairs=inverse.pairs(layers))
        prepared = inverse.prepare(layers, factors, 0.1, None)
        diagonal = BlockDiagonal().prepare(layers, factors, 0.1, None)
        return (
            prepared,
            inverse.apply(layers, prepared, vectors),
            BlockDiagonal().apply(layers, diagonal, vectors),
            inverse.apply(layers, prepared, inverse.apply(layers, prepared, vectors)),
        )

    prepared, found, alone, twice = compute(params, batch)
    assert trees.structure_of(prepared) == trees.structure_of(inverse.start(layers))
    for chain in chains(layers):
        for place in chain:
            same = np.allclose(found[place], alone[place], rtol=1e-9, atol=1e-12)
            assert same == (len(chain) == 1)
    # Symmetric: <P v, P v> = <v, P P v>.
    inner = [sum(np.vdot(x, y) for x, y in zip(*pair, strict=True)) for pair in ((found, found), (vectors, twice))]
    np.testing.assert_allclose(*inner, rtol=1e-9)
