"""Counted operations of curvature products: the algorithm's floors and a few per cent for elementwise work."""

import jax
import numpy as np
import pytest

from benchmarks import product_cost
from benchmarks.operations import flops


@pytest.mark.many_compilations("the benchmark draws its data and linearises before it counts")
def test_costs_in_gradients_on_an_existing_linearisation():
    calls = product_cost.operations(*product_cost.setting())
    counts = {name: flops(function, *arguments) for name, (function, arguments, _) in calls.items()}
    gradients = {name: count / counts["gradient"] for name, count in counts.items()}
    assert gradients["GGN product"] <= 1.25
    assert gradients["GGN quadratic form"] <= 0.65
    assert gradients["gradient with curvature point"] <= 1.01
    # What the algorithm cannot do without: J v and J^T u, or J v alone, as matrix products (see the docstring).
    assert gradients["GGN product"] >= 1.2
    assert gradients["GGN quadratic form"] >= 0.6


@pytest.mark.many_compilations("the benchmark draws its data and linearises before it counts")
def test_products_in_a_loop_are_those_that_jax_alone_gives():
    """On convolutions, whose form is another in the loop."""
    objective, params, batch, vector = product_cost.convolutional(batch_size=4)
    calls = product_cost.operations(objective, params, batch, vector)
    ours, plain = (calls[name] for name in ("linearise + GGN products in a loop", "the same by jax.linearize alone"))
    results = [jax.jit(call.function)(*call.arguments) for call in (ours, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *results)
