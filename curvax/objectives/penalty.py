"""The l2 penalty of an objective, which objective and curvature point both hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.types import PyTree, Scalar


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Penalty:
    """eta/2 ||theta||^2 over the leaves that are penalised (Martens 2016, section 6.8).

    Attributes:
        l2: eta, which may be traced; None for no penalty.
        mask: params -> a pytree of bools, which leaves are penalised; None for all.
    """

    l2: Scalar | None = None
    mask: Callable[[PyTree], PyTree] | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, l2: Scalar | None, mask: PyTree | Callable[[PyTree], PyTree] | None) -> Penalty:
        """The penalty whose mask is a function or a pytree of bools.

        Raises:
            TypeError: ``l2`` is not a number; a schedule's value is put in by ``Objective.replace``.
            ValueError: ``l2`` is negative.
        """
        if l2 is None:
            return cls()
        if callable(l2) or isinstance(l2, str) or jnp.ndim(l2) != 0:
            raise TypeError(
                f"l2= takes a number, perhaps traced, got {l2!r}; of a schedule give the value of the step, by"
                " objective.replace(l2=schedule(step)) inside the step"
            )
        if not isinstance(l2, Tracer) and l2 < 0:
            raise ValueError(f"l2= is {l2}; the strength of a penalty must not be negative")
        return cls(l2, mask if mask is None or callable(mask) else Constant(mask))

    def __bool__(self) -> bool:
        return self.l2 is not None

    def value(self, params: PyTree) -> jax.Array:
        """eta/2 ||theta||^2, a scalar."""
        if not self:
            return jnp.zeros((), trees.wide_dtype(*jax.tree.leaves(params)))
        return self.inner_products(params, (params, params))[0] / 2

    def inner_products(self, params: PyTree, *pairs: tuple[PyTree, PyTree]) -> jax.Array:
        """u^T (eta I) v for each of the pairs of vectors, with I on the leaves that are penalised."""
        marks = self._marks(params)

        def penalised(vector):
            return [leaf for leaf, on in zip(jax.tree.leaves(vector), marks, strict=True) if on]

        strength = jnp.asarray(self.l2).astype(trees.wide_dtype(*jax.tree.leaves((params, pairs))))
        products = trees.vdots(*[(penalised(left), penalised(right)) for left, right in pairs])
        return strength * products.astype(strength.dtype)

    def gradient(self, params: PyTree) -> PyTree:
        """eta theta on the leaves that are penalised, zeros on the others."""
        return trees.multiply(params, self.curvature(params))

    def curvature(self, params: PyTree) -> PyTree:
        """The Hessian: one scalar for each leaf, eta or 0."""
        strength = jnp.asarray(0.0 if self.l2 is None else self.l2)
        leaves = zip(jax.tree.leaves(params), self._marks(params), strict=True)
        scalars = [strength.astype(leaf.dtype) * jnp.asarray(on, leaf.dtype) for leaf, on in leaves]
        return jax.tree.structure(params).unflatten(scalars)

    def _marks(self, params):
        if self.mask is None:
            return [True] * len(jax.tree.leaves(params))
        mask = self.mask(params)
        trees.check_same_leaves(mask, params, "l2_mask")
        for path, on in zip(trees.leaf_paths(mask), jax.tree.leaves(mask), strict=True):
            if isinstance(on, Tracer) or jnp.shape(on) or jnp.result_type(on) != jnp.dtype(bool):
                raise TypeError(
                    f"l2_mask[{path!r}] is {on!r}; a leaf is penalised or not, which a bool says, such as"
                    " leaf.ndim > 1: made by jnp inside of jit it is a traced array"
                )
        return list(map(bool, jax.tree.leaves(mask)))


class Constant(trees.Static):
    """A function that returns the same pytree whatever it is given."""

    def __call__(self, *_: Any) -> PyTree:
        return self.tree

    def _key(self):
        return jax.tree.structure(self.tree), tuple(map(bool, jax.tree.leaves(self.tree)))
