"""The study of the positive-curvature Hessian: its grid is the paper's, and its network is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from benchmarks import pch_study


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def test_the_grid_is_the_paper_s_and_leaves_out_gauss_newton_where_the_criterion_is_not_convex():
    grid = pch_study.settings("cross-entropy", ["paper"])
    layered = [setting for setting in grid if setting.rule]
    assert {setting.method for setting in layered} == {
        f"{curvature} {solver}" for curvature in ("fisher", "gauss_newton", "pch1") for solver in ("kfi", "ea_cg")
    }
    assert len(layered) == 6 * 4 * 3
    assert {s.method for s in grid} - {s.method for s in layered} == {"adam", "momentum sgd"}
    assert not [s for s in pch_study.settings("bounded", pch_study.RULES) if "gauss_newton" in s.method]
    labels = [setting.label for setting in pch_study.settings("bounded", pch_study.RULES)]
    assert len(labels) == len(set(labels))


@pytest.mark.many_compilations("the weights of each layer are drawn eagerly")
def test_the_network_is_the_paper_s():
    params = pch_study.initial(sizes=(7, 5, 3))
    for layer in params:
        limit = np.sqrt(6 / sum(layer["weights"].shape))
        assert np.abs(layer["weights"]).max() <= limit
        assert not np.any(layer["bias"])
    x = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    hidden = special.expit(x @ params[0]["weights"] + params[0]["bias"])
    expected = hidden @ params[1]["weights"] + params[1]["bias"]
    np.testing.assert_allclose(jax.jit(pch_study.network)(params, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
