"""Parameters read by numbers: a layer of a stack by a loop's counter, rows of a table by one or two indices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


STACK = {"w": normal(0, 4, 3, 3), "b": normal(1, 4, 3)}
TABLE, DEEP = {"w": normal(2, 4, 5, 2)}, {"w": normal(3, 2, 6)}
X, ROWS, COLUMNS = normal(4, 6, 3), jnp.array([0, 3, 3, 1, 0, 2]), jnp.array([4, 0, 0, 2, 2, 1])


def layer(p, i, h):
    return jnp.tanh(h @ p["w"][i] + p["b"][i])


def looped(p, x):
    return jax.lax.fori_loop(0, 4, functools.partial(layer, p), x)


def over_numbers(p, x):
    return jax.lax.scan(lambda h, i: (layer(p, i, h), None), x, jnp.arange(4)[::-1])[0]


def from_behind(p, x):
    return jax.lax.fori_loop(0, 4, lambda i, h: layer(p, 3 - i, h), x)


def two_loops(p, x):
    return looped(p, jax.lax.fori_loop(0, 4, functools.partial(layer, p), x))


def each_twice(p, x):
    return jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p["w"][i // 2] + p["b"][i]), x)


def nested(p, x):
    stack = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), p)

    def outer(i, h):
        return jax.lax.fori_loop(0, 2, lambda j, h: jnp.tanh(h @ stack["w"][i, j] + stack["b"][i, j]), h)

    return jax.lax.fori_loop(0, 2, outer, x)


CASES = {
    "fori_loop": (looped, STACK, X),
    "scan over numbers": (over_numbers, STACK, X),
    "from behind": (from_behind, STACK, X),
    "two loops": (two_loops, STACK, X),
    "each twice": (each_twice, STACK, X),
    "nested": (nested, STACK, X),
    "pairs": (lambda p, i: jnp.tanh(p["w"][i[0], i[1]]), TABLE, (ROWS, COLUMNS)),
    "pairs of a transpose": (lambda p, i: jnp.tanh(p["w"].T[:, i[1], i[0]].T), TABLE, (ROWS, COLUMNS)),
    "pairs out of range": (
        lambda p, i: jnp.tanh(p["w"].at[i].get(mode="fill", fill_value=0)),
        TABLE,
        (ROWS + 1, COLUMNS),
    ),
    "pairs that are clipped": (lambda p, i: jnp.tanh(p["w"].at[i].get(mode="clip")), TABLE, (ROWS + 2, COLUMNS)),
    "columns": (lambda p, i: jnp.tanh(p["w"][:, i].T), DEEP, COLUMNS),
    "a transpose of three axes": (
        lambda p, i: jnp.tanh(p["w"].T[i].reshape(len(i), -1)),
        {"w": normal(5, 2, 3, 6)},
        COLUMNS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_by_numbers_is_a_layer(name):
    model, params, inputs = CASES[name]
    targets = normal(6, *jax.eval_shape(model, params, inputs).shape)
    objective = curvax.Objective(model, curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, (inputs, targets))

    @jax.jit
    def answers(params):
        tapped = curvax.tap(layers, objective.linearize(params, (inputs, targets)))
        return (
            trees.ravel(tapped.value_and_gradient()[1]),
            jax.vmap(trees.ravel)(curvax.layers.per_example_gradients(tapped)),
            curvax.layers.gradient_norms(tapped),
            trees.ravel(curvax.layers.exact_ggn_diagonal(tapped)),
            jnp.linalg.eigvalsh(curvax.gram(tapped)),
        )

    @jax.jit
    def expected(params):
        def one(x, y):
            alone = jax.tree.map(lambda leaf: leaf[None], (x, y))
            return trees.ravel(jax.grad(lambda p: oracles.value(objective, p, alone))(params))

        whole = jax.grad(lambda p: oracles.value(objective, p, (inputs, targets)))(params)
        matrix = oracles.dense_ggn(objective, params, (inputs, targets))
        return trees.ravel(whole), jax.vmap(one)(inputs, targets), jnp.diag(matrix), jnp.linalg.eigvalsh(matrix)

    gradient, rows, norms, diagonal, eigenvalues = answers(params)
    whole, each, entries, spectrum = expected(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(gradient, whole)
    close(rows, each)
    close(norms, np.linalg.norm(each, axis=1))
    close(diagonal, entries)
    count = min(len(spectrum), len(eigenvalues))
    close(eigenvalues[-count:], spectrum[-count:], atol=1e-10)


def test_a_loop_has_the_layers_and_factors_of_a_scan_over_the_stack():
    def scanned(p, x):
        return jax.lax.scan(lambda h, q: (jnp.tanh(h @ q["w"] + q["b"]), None), x, p)[0]

    tables = [
        str(curvax.find_layers(curvax.Objective(model, curvax.losses.squared_error()), STACK, (X, X)))
        for model in (looped, from_behind, scanned)
    ]
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(
    "read",
    [lambda w, i: jax.lax.dynamic_slice(w, (i, 0), (2, 2)), lambda w, i: jax.lax.dynamic_slice(w, (i, 0), (3, 1))],
)
def test_windows_are_refused_with_the_way_out(read):
    def windows(p, i):
        return jax.vmap(functools.partial(read, p["w"]))(i).reshape(len(i), -1)

    objective = curvax.Objective(windows, curvax.losses.squared_error())
    with pytest.raises(ValueError, match=r"w .* enters `gather`: several rows by one index.*one by one"):
        curvax.find_layers(objective, {"w": normal(7, 6, 2)}, (ROWS, jnp.zeros((6, 4))))
