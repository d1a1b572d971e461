"""flax nnx modules as model functions: parameters apart from everything else, which comes back from the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from curvax.types import PyTree


class Functional(NamedTuple):
    """A module as a function.

    Attributes:
        model_fn: (params, (inputs, rest)) -> (outputs, new rest); for ``Objective(..., has_aux=True)``.
        rest: Everything else: batch statistics, counters of random keys, caches.
        example_axes: Where the examples are, for ``Objective``.
        merge: (params, rest) -> a module with these.
    """

    model_fn: Callable[[PyTree, tuple[Any, PyTree]], tuple[Any, PyTree]]
    params: PyTree
    rest: PyTree
    example_axes: Any
    merge: Callable[[PyTree, PyTree], Any]


def functional(module: Any, *, only: Any = None, call: Callable[..., Any] | None = None) -> Functional:
    """Splits a flax nnx module into a model function, its parameters, and the rest of its state.

    Batch statistics and random counters travel in the inputs of the model and come back as its auxiliary outputs, out
    of the pass that gives loss and gradient.

    Args:
        only: What counts as a parameter, a filter of nnx; ``nnx.Param`` by default.
        call: (module, inputs) -> outputs; the module's own call by default.

    Raises:
        ImportError: flax is not installed.

    Example:
        >>> from flax import nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.dense, self.norm = nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.norm(self.dense(x))
        >>> net = curvax.nnx.functional(Net(nnx.Rngs(0)))
        >>> objective = curvax.Objective(
        ...     net.model_fn, curvax.losses.softmax_cross_entropy(), has_aux=True, example_axes=net.example_axes
        ... )
        >>> batch = ((jnp.ones((4, 3), jnp.float32), net.rest), jnp.zeros(4, int))
        >>> (loss, rest), grads, at = objective.value_and_grad(net.params, batch, has_aux=True)
        >>> bool(jnp.any(rest["norm"]["mean"][...] != 0))         # the new batch statistics
        True
        >>> trained = net.merge(net.params, rest)
        >>> trained(jnp.ones((1, 3), jnp.float32)).shape
        (1, 2)
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("curvax.nnx needs flax: pip install flax") from error
    import jax

    graph, params, rest = nnx.split(module, nnx.Param if only is None else only, ...)

    def merge(params, rest):
        # A copy of the containers: merging must not tie the module to the variables of the caller.
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, params), jax.tree.map(lambda leaf: leaf, rest))

    def model_fn(params, inputs):
        data, rest = inputs
        module = merge(params, rest)
        outputs = module(data) if call is None else call(module, data)
        return outputs, nnx.split(module, nnx.Param if only is None else only, ...)[2]

    return Functional(model_fn, params, rest, ((0, None), 0), merge)
