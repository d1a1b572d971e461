"""nnx modules as model functions: gradients, batch statistics of the same pass, layers, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import curvax


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.drop(jnp.tanh(self.norm(self.first(x)))))


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def setting():
    module = nnx.jit(lambda: Net(nnx.Rngs(0)))()
    functional = curvax.nnx.functional(module)
    objective = curvax.Objective(
        functional.model_fn,
        curvax.losses.softmax_cross_entropy(),
        has_aux=True,
        example_axes=functional.example_axes,
    )
    generator = np.random.default_rng(0)
    data, labels = generator.normal(size=(6, 3)).astype(np.float32), generator.integers(0, 2, 6)
    return module, functional, objective, data, labels


def test_loss_gradient_and_statistics_are_those_of_the_module():
    module, functional, objective, data, labels = setting()
    batch = ((data, functional.rest), labels)
    (loss, rest), gradient, _ = jax.jit(lambda p, b: objective.value_and_grad(p, b, has_aux=True))(
        functional.params, batch
    )

    def own(module):
        return optax.softmax_cross_entropy_with_integer_labels(module(data), labels).mean()

    true_loss, true_gradient = nnx.jit(nnx.value_and_grad(own))(module)
    np.testing.assert_allclose(loss, true_loss, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(true_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(rest["norm"]["mean"][...], module.norm.mean[...], rtol=1e-6)
    merged = functional.merge(functional.params, rest)
    np.testing.assert_allclose(merged.norm.var[...], module.norm.var[...], rtol=1e-6)


def test_the_masks_of_dropout_change_from_step_to_step():
    _, functional, objective, data, labels = setting()
    step = jax.jit(lambda p, b: objective.value_and_grad(p, b, has_aux=True)[0])
    first, rest = step(functional.params, ((data, functional.rest), labels))
    again, _ = step(functional.params, ((data, functional.rest), labels))
    second, _ = step(functional.params, ((data, rest), labels))
    assert first == again
    assert first != second


def test_layers_are_found_and_the_module_can_be_evaluated_afterwards():
    _, functional, objective, data, labels = setting()
    batch = ((data, functional.rest), labels)
    layers = curvax.find_layers(objective, functional.params, batch)
    assert layers.couples_examples
    assert {layer.kind for layer in layers} == {"dense", "scale", "shift"}

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return tapped.value_and_gradient()[1], objective.value_and_grad(params, batch)[1], tapped.point.aux

    gradient, truth, rest = compute(functional.params, batch)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    module = functional.merge(functional.params, rest)
    module.eval()
    assert nnx.jit(lambda module, x: module(x))(module, data).shape == (6, 2)
