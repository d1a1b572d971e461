"""Networks in homogeneous coordinates, which theory is written in, and every target that they give a probability to.

The weights of a layer are one matrix with a row for the constant one, so that the blocks of the library are the leaves
and dense matrices of the oracles are in the order of the blocks.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvax


def network(weights, x, omegas=None, phis=None, activation=jnp.tanh):
    """The network of Martens 2016, section 6.10: abar_i = Omega_i (phi(Phi_i s_i), 1), s_i = W_i abar_{i-1}."""
    count = len(weights)
    omegas = [None] * count if omegas is None else omegas
    phis = [None] * count if phis is None else phis
    for i, (w, omega, phi) in enumerate(zip(weights, omegas, phis, strict=True)):
        x = with_one(x if i == 0 else activation(x))
        x = (x if omega is None else x @ omega.T) @ w
        x = x if phi is None else x @ phi.T
    return x


def with_one(x):
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def bernoulli(z, y):
    """-log P(y|z) of independent bits."""
    return jnp.sum(jnp.logaddexp(0, z) - y * z, axis=-1)


def categorical(z, y):
    """-log P(y|z) of a class, as a one-hot vector."""
    return -jnp.sum(y * jax.nn.log_softmax(z), axis=-1)


class Family(NamedTuple):
    """A loss, its negative log likelihood and all targets of an example."""

    loss: curvax.losses.Loss
    negative_log: object
    targets: np.ndarray


FAMILIES = {
    "bernoulli": Family(
        curvax.losses.sigmoid_binary_cross_entropy(),
        bernoulli,
        np.array(list(itertools.product([0.0, 1.0], repeat=2))),
    ),
    "categorical": Family(curvax.losses.softmax_cross_entropy(), categorical, np.eye(3)),
}


class Problem(NamedTuple):
    family: Family
    objective: curvax.Objective
    weights: list
    batch: tuple
    layers: curvax.Layers

    def tapped(self, weights, batch):
        return curvax.tap(self.layers, self.objective.linearize(weights, batch))

    def replace_model(self, model, weights):
        """The same data and loss with another network, of other weights."""
        objective = curvax.Objective(model, self.family.loss)
        layers = curvax.find_layers(objective, weights, self.batch)
        return self._replace(objective=objective, weights=weights, layers=layers)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def problem(family, *hidden, examples=40, features=3, seed=0):
    family = FAMILIES[family]
    sizes = [features, *hidden, family.targets.shape[1]]
    weights = [normal(seed + i, m + 1, n) / m**0.5 for i, (m, n) in enumerate(itertools.pairwise(sizes))]
    labels = np.random.default_rng(seed + 100).integers(len(family.targets), size=examples)
    batch = normal(seed + 101, examples, features), jnp.asarray(family.targets[labels])
    objective = curvax.Objective(network, family.loss)
    return Problem(family, objective, weights, batch, curvax.find_layers(objective, weights, batch))


class Cases(NamedTuple):
    """Every example with every target.

    Attributes:
        inputs: For each layer abar, (examples, inputs).
        cotangents: For each layer g, (targets, examples, outputs).
        probabilities: P(y|x) / N, (targets, examples).
        labelled: The same of the training targets: 1 / N where the target is theirs.
    """

    inputs: list
    cotangents: list
    probabilities: jax.Array
    labelled: jax.Array

    def gradients(self):
        """abar (x) g of all layers side by side, (targets * examples, parameters)."""
        count = self.probabilities.size
        products = [jnp.einsum("ni,kno->knio", a, g) for a, g in zip(self.inputs, self.cotangents, strict=True)]
        return jnp.concatenate([p.reshape(count, -1) for p in products], axis=1)


def every_case(family: Family, weights, batch) -> Cases:
    """The cases of the network without transformations, from its definition."""

    def run(perturbations):
        x, inputs = batch[0], []
        for i, (w, e) in enumerate(zip(weights, perturbations, strict=True)):
            inputs.append(with_one(x if i == 0 else jnp.tanh(x)))
            x = inputs[-1] @ w + e
        return x, inputs

    count = batch[0].shape[0]
    zeros = [jnp.zeros((count, w.shape[1])) for w in weights]
    outputs, inputs = run(zeros)

    def of(y):
        targets = jnp.broadcast_to(y, outputs.shape)
        return jax.grad(lambda e: jnp.sum(family.negative_log(run(e)[0], targets)))(zeros)

    targets = jnp.asarray(family.targets)
    probabilities = jax.vmap(lambda y: jnp.exp(-family.negative_log(outputs, y)))(targets) / count
    labelled = jnp.all(targets[:, None] == batch[1], axis=-1).astype(outputs.dtype) / count
    return Cases(inputs, jax.vmap(of)(targets), probabilities, labelled)
