"""The image networks exist, have the sizes of their papers, and take a step of CurveBall and of L-SR1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks import image_networks as networks

SMALL = {
    "mlp": lambda: networks.mlp((784, 128, 64, 32, 10)),
    "lenet": networks.lenet,
    "basic_cnn": networks.basic_cnn,
    "basic_cnn with batch norm": lambda: networks.basic_cnn(batch_norm=True),
    "cifar_net": networks.cifar_net,
    "resnet20": networks.resnet20,
}
LARGE = {"resnet18": networks.resnet18, "vgg_f": lambda: networks.vgg_f(classes=10, image_size=64)}
NETWORKS = {**SMALL, **LARGE}


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: networks.lenet(batch_norm=False), 431_080),
        (networks.resnet20, 272_000),
        (networks.resnet18, 11_170_000),
        (networks.vgg_f, 60_000_000),
    ],
)
def test_sizes_are_those_of_the_papers(make, count):
    params = jax.eval_shape(make().init, jax.random.key(0))
    np.testing.assert_allclose(curvax.trees.size(params), count, rtol=0.03)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "cifar_net" else ()) for n in NETWORKS]
)
@pytest.mark.parametrize("make", [curvax.curveball, curvax.lsr1])
def test_it_takes_a_step(name, make):
    network = NETWORKS[name]()
    objective = curvax.Objective(network.apply, curvax.losses.softmax_cross_entropy())
    keys = jax.random.split(jax.random.key(0))
    params = jax.jit(network.init)(keys[0])
    batch = (jax.random.normal(keys[1], (4, *network.image_shape)), jnp.arange(4))
    tx = make()

    @jax.jit
    def step(params, state):
        loss, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, loss

    # The first radius of L-SR1, the norm of the gradient, may be far too long (272 on VGG-f, where 0.07 is right);
    # rejected steps halve it.
    after, state = params, tx.init(params)
    for _ in range(20):
        after, state, loss = step(after, state)
        assert np.isfinite(loss)
        if any(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)):
            break
    assert state.info.skipped_steps == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True))
