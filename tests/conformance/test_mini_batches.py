"""Whole methods at their defaults on mini-batches: they end near the lowest loss that they have reached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax

STEPS, EXAMPLES, BATCH = 300, 600, 100


def teacher(seed=0):
    """Images of three kinds in noise, a tenth of the labels wrong, so that fitting a batch is not fitting the rest."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, EXAMPLES)
    inputs = generator.normal(size=(3, 12))[labels] + 0.8 * generator.normal(size=(EXAMPLES, 12))
    wrong = generator.random(EXAMPLES) < 0.1
    labels = np.where(wrong, generator.integers(0, 3, EXAMPLES), labels)
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32)


def network(params, x):
    for weights, bias in params[:-1]:
        x = jax.nn.relu(x @ weights + bias)
    return x @ params[-1][0] + params[-1][1]


def initial(sizes=(12, 24, 24, 3)):
    keys = jax.random.split(jax.random.key(0), len(sizes))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=False)
    return [
        (jax.random.normal(key, (rows, columns), jnp.float32) * (2 / rows) ** 0.5, jnp.zeros(columns, jnp.float32))
        for key, rows, columns in pairs
    ]


OBJECTIVE = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
DATA = teacher()


def losses_of(tx, seed=0):
    """The loss of all examples after every step of a run."""
    generator = np.random.default_rng(seed)
    order = jnp.asarray(np.stack([generator.permutation(EXAMPLES)[:BATCH] for _ in range(STEPS)]))

    def step(carry, chosen):
        params, state = carry
        batch = jax.tree.map(lambda leaf: leaf[chosen], DATA)
        _, gradient, at = OBJECTIVE.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        params = optax.apply_updates(params, updates)
        return (params, state), OBJECTIVE(params, DATA)

    params = initial()
    return np.asarray(jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), order)[1])(params))


METHODS = {
    "hessian_free": curvax.hessian_free,
    "natural_gradient": curvax.natural_gradient,
    "newton_cg": curvax.newton_cg,
    "krylov_subspace_descent": curvax.krylov_subspace_descent,
    "curveball": curvax.curveball,
    "curveball from a hundredth": functools.partial(curvax.curveball, initial_damping=0.01),
    "curveball from a hundred": functools.partial(curvax.curveball, initial_damping=100.0),
    "lsr1": curvax.lsr1,
    "lsr1_linesearch": curvax.lsr1_linesearch,
    "levenberg_marquardt": curvax.levenberg_marquardt,
    "scale_by_cubic_step": lambda: curvax.scale_by_cubic_step(optax.sgd(1.0)),
    "kfac": lambda: curvax.kfac(curvax.find_layers(OBJECTIVE, initial(), DATA)),
}


@pytest.mark.many_compilations("batches, the network and its layers are made eagerly")
@pytest.mark.parametrize("name", METHODS)
def test_three_hundred_steps_end_near_the_lowest_loss(name):
    losses = losses_of(METHODS[name]())
    assert np.all(np.isfinite(losses))
    assert losses[-1] <= 1.5 * losses.min(), (losses.min(), losses[-1])
    assert losses[-1] < 0.8, "it is to have learnt something: without a look at the inputs it is 1.1"
