"""Convolutions of J and J^T are rewritten for loops on a CPU, and compute what they computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.programs.convolutions import fast_in_loops
from curvax.programs.linearize import linearize
from curvax.programs.walk import equations

CASES = {  # images, kernels, options of the convolution
    "channels last": ((2, 6, 5, 3), (3, 3, 3, 4), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "channels first": ((2, 3, 6, 5), (4, 3, 3, 2), {}),
    "along one axis": ((2, 3, 7), (4, 3, 3), {}),
    "in three dimensions": ((2, 3, 4, 3, 4), (2, 3, 2, 2, 2), {}),
    "strides": ((2, 3, 6, 7), (4, 3, 3, 3), {"window_strides": (2, 3)}),
    "dilated": ((2, 3, 6, 7), (4, 3, 2, 2), {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2)}),
    "groups": ((2, 4, 6, 5), (6, 2, 3, 3), {"feature_group_count": 2}),
    "depthwise": ((2, 4, 6, 5), (8, 1, 3, 3), {"feature_group_count": 4}),
    "outputs elsewhere": ((3, 6, 2, 5), (3, 4, 3, 3), {"dimension_numbers": ("CHNW", "HOWI", "HCNW")}),
}


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def convolution(options):
    options = {"window_strides": None, "padding": "SAME"} | options

    def convolve(images, kernels):
        strides = options["window_strides"] or (1,) * (images.ndim - 2)
        padding = [(1, 1)] * (images.ndim - 2)  # explicit, as inputs may be dilated
        return jax.lax.conv_general_dilated(
            images, kernels, **options | {"window_strides": strides, "padding": padding}
        )

    return convolve


def wrapped(convolve, how):
    if how == "jit":
        return jax.jit(lambda x, w: jnp.tanh(convolve(x, w)))
    if how == "remat":
        return jax.checkpoint(lambda x, w: jnp.tanh(convolve(x, jnp.sin(w))))
    if how == "scan":
        return lambda x, w: jax.lax.scan(
            lambda c, v: (c + jnp.tanh(convolve(x, v)).sum(), c), 0.0, jnp.stack([w, 2 * w])
        )
    return convolve


@pytest.mark.parametrize("how", ["plain", "jit", "remat", "scan"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_jax_and_no_other_form_is_left(case, how):
    if how != "plain" and case not in ("channels first", "strides"):
        case = "channels last"
    shape, kernel, options = CASES[case]
    function, x, w = wrapped(convolution(options), how), draw(0, shape), draw(1, kernel)
    dx, dw = draw(2, shape), draw(3, kernel)

    @jax.jit
    def both(x, w):
        value, jvp, transpose, _, _ = linearize(function, x, w)
        cotangent = jax.tree.map(jnp.cos, value)
        expected_jvp = jax.jvp(function, (x, w), (dx, dw))[1]
        expected_transpose = jax.vjp(function, x, w)[1](cotangent)
        return (jvp(dx, dw), transpose(cotangent)), (expected_jvp, expected_transpose)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), *both(x, w))

    def products(x, w):
        value, jvp, transpose, _, _ = linearize(function, x, w)
        return jvp(dx, dw), transpose(value)

    # In both, images and channels of every convolution stand where XLA's kernel wants them, but for the value's own.
    found = [eqn for eqn in equations(jax.make_jaxpr(products)(x, w)) if eqn.primitive.name == "conv_general_dilated"]
    rank = len(shape) - 2
    fast = [eqn for eqn in found if eqn.params["dimension_numbers"].lhs_spec == (0, rank + 1, *range(1, rank + 1))]
    assert len(fast) >= 3, "J v of x and of w, and J^T"
    others = [eqn for eqn in found if eqn not in fast]
    assert len(others) <= 2


def test_functions_without_convolutions_stay_as_they_are():
    linear = jax.linearize(jnp.tanh, jnp.ones(3))[1]
    assert fast_in_loops(linear, jnp.ones(3)) is linear


def test_other_processors_lay_out_convolutions_by_themselves(monkeypatch):
    linear = jax.linearize(lambda w: convolution({})(draw(0, (1, 2, 3, 3)), w), draw(1, (2, 2, 2, 2)))[1]
    assert fast_in_loops(linear, draw(2, (2, 2, 2, 2))) is not linear
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fast_in_loops(linear, draw(2, (2, 2, 2, 2))) is linear
