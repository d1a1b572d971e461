"""Weights joined with constants: entries of a matrix that belong to no parameter count in nothing that is a sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles

N = 5


def reference_class(params, x):
    """A last class whose logit is fixed."""
    return jnp.tanh(x @ params["w"]) @ jnp.pad(params["v"], ((0, 0), (0, 1)))


def frozen_part(params, x):
    """A matrix of which a block and a row are not trained."""
    frozen = jnp.full((2, 2), 0.3)
    inner = jnp.block([[params["w"], jnp.zeros((3, 2))], [jnp.zeros((2, 4)), frozen]])
    hidden = jnp.tanh(jnp.concatenate([x, x[:, :2]], axis=1) @ inner)
    return hidden @ jnp.concatenate([params["v"], jnp.ones((2, 2))])


def stacked_with_a_constant(params, x):
    experts = jnp.stack([params["w"], jnp.ones_like(params["w"])])
    return jnp.tanh(jnp.einsum("ni,eio->neo", x, experts)).sum(1) @ params["v"]


def padded_kernel(params, x):
    """A causal kernel, padded behind; channels last."""
    kernel = jnp.pad(params["w"].reshape(1, 3, 4), ((0, 2), (0, 0), (0, 0)))
    x = jnp.stack([x, 2 * x, x - 1, x**2], axis=1)
    x = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.tanh(x).mean(1) @ params["v"]


def padded_inside(params, x):
    """Zeros between the rows of a matrix, and some of its rows cut off."""
    w = jax.lax.pad(params["w"], 0.0, ((0, 0, 1), (-1, 0, 0)))
    return jnp.tanh(jnp.concatenate([x, x], axis=1)[:, :5] @ w) @ params["v"][:3]


def padding_row(params, x):
    """A table behind a row of zeros, which is read where there is no token."""
    tokens = jnp.clip(jnp.round(2 * x), -1, 2).astype(int) + 1
    return jnp.tanh(jnp.concatenate([jnp.zeros((1, 4)), params["w"]])[tokens]).sum(1) @ params["v"]


MODELS = {
    reference_class: {"v"},
    frozen_part: {"w", "v"},
    stacked_with_a_constant: {"w"},
    padded_kernel: {"w"},
    padded_inside: {"w"},
    padding_row: {"w"},
}
"""The models, and which of their parameters are joined with constants."""
every_model = pytest.mark.parametrize("model", MODELS)


def setting(model):
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 4))), "v": jnp.asarray(generator.normal(size=(4, 2)))}
    x = jnp.asarray(generator.normal(size=(N, 3)))
    z = jax.eval_shape(model, params, x)
    batch = (x, jnp.asarray(generator.normal(size=z.shape)))
    return curvax.Objective(model, curvax.losses.squared_error()), params, batch


@every_model
def test_norms_inner_products_diagonals_and_steps(model):
    objective, params, batch = setting(model)
    layers = curvax.find_layers(objective, params, batch)
    methods = {m: curvax.scale_by_sample_space(layers, damping=0.1, method=m) for m in ("cholesky", "cg")}

    @jax.jit
    def compute(params, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        tapped = curvax.tap(layers, at)
        steps = [tx.update(gradient, tx.init(params), params, at=at)[0] for tx in methods.values()]
        rows = jax.vmap(lambda x, y: trees.ravel(jax.grad(objective)(params, (x[None], y[None]))))(*batch)
        return (
            rows,
            curvax.layers.gradient_norms(tapped),
            curvax.layers.gradient_inner_products(tapped),
            trees.ravel(curvax.layers.empirical_fisher_diagonal(tapped)),
            curvax.gram(tapped),
            trees.ravel(gradient),
            [trees.ravel(step) for step in steps],
        )

    rows, norms, products, diagonal, gram, gradient, steps = compute(params, batch)
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-10)
    np.testing.assert_allclose(products, rows @ rows.T, rtol=0, atol=1e-12 * np.sum(rows**2))
    np.testing.assert_allclose(diagonal, np.mean(rows**2, axis=0), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(np.trace(gram), np.trace(dense), rtol=1e-10)
    for step, tolerance in zip(steps, (1e-8, 1e-4), strict=True):
        truth = np.linalg.solve(dense + 0.1 * np.eye(len(dense)), gradient)
        assert np.linalg.norm(step - truth) < tolerance * np.linalg.norm(truth)


@every_model
def test_their_matrices_have_no_kronecker_factors_and_the_table_says_why(model):
    layers = curvax.find_layers(*setting(model))
    assert {block.name for block in layers.treatment.kronecker} == {"v", "w"} - MODELS[model]
    assert set(layers.treatment.reasons) == MODELS[model]
    assert all("belong to no parameter" in reason for reason in layers.treatment.reasons.values())
