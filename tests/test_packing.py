"""Small leaves joined to one vector: there and back, and what stays apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.packing import packing_of
from curvax.trees import SMALL
from tests.trees.cases import mixed


def test_there_and_back_with_leading_axes():
    tree = jax.tree.map(jnp.asarray, mixed())
    packing = packing_of(tree)
    assert [array.shape for array in packing.pack(tree)] == [(2, 3), (7,), (SMALL + 1,)]
    there_and_back = jax.jit(lambda block: packing.unpack(packing.pack(block)))
    for lead in ((), (4,), (2, 3)):
        block = jax.tree.map(lambda leaf, lead=lead: np.broadcast_to(leaf, (*lead, *leaf.shape)), tree)
        back = there_and_back(block)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), back) == jax.tree.map(lambda x: (x.shape, x.dtype), block)
        jax.tree.map(np.testing.assert_array_equal, back, block)


def test_leaves_on_a_mesh_stay_apart():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = jax.device_put([jnp.ones(2), jnp.ones(3)], place)
    assert [array.shape for array in packing_of(tree).pack(tree)] == [(2,), (3,)]
    assert [array.shape for array in packing_of([jnp.ones(2), jnp.ones(3)]).pack(tree)] == [(5,)]


def test_a_result_of_another_shape_is_named_by_its_leaf():

    @jax.jit
    def solve(b):
        return curvax.solvers.cg(lambda v: {"a": v["a"], "b": v["b"][:2]}, b, max_iterations=2, tolerance=0.0)

    with pytest.raises(ValueError, match=r"the result of matvec\['b'\] has shape \(2,\)"):
        solve({"a": np.ones(2), "b": np.ones(3)})


@pytest.mark.parametrize("solver", ["cg", "steihaug"])
def test_solvers_give_pytrees_to_the_functions_of_the_caller(solver):
    """One matrix that couples all leaves."""
    sizes = {"a": (2, 2), "b": (3,), "c": ()}
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    matrix = np.asarray(root @ root.T + np.eye(8), np.float32)
    b = {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in sizes.items()}
    seen = []

    def matvec(v):
        seen.append(jax.tree.map(jnp.shape, v))
        return curvax.trees.unravel(matrix @ curvax.trees.ravel(v), v)

    def precondition(r):
        seen.append(jax.tree.map(jnp.shape, r))
        return jax.tree.map(lambda leaf: 0.5 * leaf, r)

    options = {"radius": 1e6} if solver == "steihaug" else {}
    options |= {"preconditioner": precondition, "max_iterations": 30, "tolerance": 1e-6}
    found = jax.jit(lambda b: getattr(curvax.solvers, solver)(matvec, b, **options))(b)
    assert all(shapes == sizes for shapes in seen)
    exact = np.linalg.solve(matrix.astype(np.float64), np.concatenate([leaf.ravel() for leaf in b.values()]))
    value = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.value)])
    np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-5)
