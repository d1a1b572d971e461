"""What one equation of a jaxpr costs in floating-point operations; the prices behind ``benchmarks.operations``.

Sources: G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition (2013), sections 3.2, 4.2, 5.1-5.2, 7.4-7.5,
8.3 and figure 8.6.1; the Householder counts with k reflectors are those of LAPACK Working Note 41, appendix C.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.extend.core import JaxprEqn


def price(eqn: JaxprEqn) -> float:
    """The floating-point operations of an equation without a body: by the tables, or else 1 per element of its results.

    Nothing where neither operands nor results are floating-point numbers.
    """
    name = eqn.primitive.name
    if not any(_is_floating(atom) for atom in (*eqn.invars, *eqn.outvars)):
        return 0.0
    if name in _MATRIX_PRICES:
        *batch, rows, columns = _shape(eqn.invars[0])
        return math.prod(batch) * _MATRIX_PRICES[name](rows, columns, eqn)
    return float(_PRICES.get(name, _per_result)(eqn))


def is_priced(name: str) -> bool:
    """Whether a primitive has a price of its own, so that a body among its parameters is not looked into."""
    return name in _PRICES or name in _MATRIX_PRICES


def _shape(atom) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _size(atom) -> int:
    return math.prod(_shape(atom))


def _is_floating(atom) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _per_result(eqn):
    return sum(map(_size, eqn.outvars))


def _per_operand(eqn):
    return sum(map(_size, eqn.invars))


def _per_reduced_element(eqn):
    return sum(map(_size, eqn.invars[: len(eqn.outvars)]))  # the other operands of ``reduce`` are initial values


def _dot_general(eqn):
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    return _contraction(eqn, contracted, batch)


def _ragged_dot_general(eqn):
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = ragged.dot_dimension_numbers
    return _contraction(eqn, contracted, (*batch, *ragged.rhs_group_dimensions))


def _contraction(eqn, contracted, batch):
    """Each element of the left operand meets the elements of the right one along its free axes."""
    left, right = eqn.invars[:2]
    free = [size for axis, size in enumerate(_shape(right)) if axis not in (*contracted, *batch)]
    return 2 * _size(left) * math.prod(free)


def _convolution(eqn):
    kernel, output_features = _shape(eqn.invars[1]), eqn.params["dimension_numbers"].rhs_spec[0]
    terms = math.prod(size for axis, size in enumerate(kernel) if axis != output_features)
    return 2 * _size(eqn.outvars[0]) * terms / math.prod(eqn.params["lhs_dilation"])


def _per_window_element(eqn):
    return _size(eqn.outvars[0]) * math.prod(eqn.params["window_dimensions"])


def _scatter_windows(eqn):
    return _size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"])


def _per_update(eqn):
    return _size(eqn.invars[2])


def _sort(eqn):
    axis = eqn.params.get("dimension", -1)
    return _size(eqn.invars[0]) * math.log2(max(_shape(eqn.invars[0])[axis], 1))


def _fourier(eqn):
    length = math.prod(eqn.params["fft_lengths"])
    kinds = [_is_complex(atom) for atom in (*eqn.invars, *eqn.outvars)]
    full = max(_size(eqn.invars[0]), _size(eqn.outvars[0]))  # of a real transform, the side that is not halved
    return (5 if all(kinds) else 2.5) * full * math.log2(max(length, 1))


def _is_complex(atom):
    return jnp.issubdtype(atom.aval.dtype, jnp.complexfloating)


def _triangular_solve(eqn):
    matrix, right_sides = eqn.invars
    return _size(right_sides) * _shape(matrix)[-1]


def _tridiagonal_solve(eqn):
    """Elimination without pivoting: 3 operations per row of the matrix and 5 per entry of the right sides."""
    _, diagonal, _, right_sides = eqn.invars
    return 3 * _size(diagonal) + 5 * _size(right_sides)


def _lu(m, n, eqn):
    return min(m, n) ** 2 * (max(m, n) - min(m, n) / 3)


def _reflectors(m, n):
    """Householder triangularisation of an m x n matrix."""
    return 2 * min(m, n) ** 2 * (max(m, n) - min(m, n) / 3)


def _accumulate(m, columns, reflectors):
    """The first columns of the product of the reflectors, each of length m."""
    return 4 * m * columns * reflectors - 2 * (m + columns) * reflectors**2 + 4 / 3 * reflectors**3


def _qr(m, n, eqn):
    return _reflectors(m, n) + _accumulate(m, _shape(eqn.outvars[0])[-1], min(m, n))


def _householder_product(m, n, eqn):
    return _accumulate(m, n, _shape(eqn.invars[1])[-1])


def _apply_reflectors(m, n, eqn):
    reflectors, target = _shape(eqn.invars[1])[-1], _shape(eqn.invars[2])[-2:]
    others = target[1] if eqn.params["left"] else target[0]
    return 2 * others * reflectors * (2 * m - reflectors)


def _svd(m, n, eqn):
    """The cheaper of Golub-Reinsch and Chan's algorithm, which starts from a QR decomposition."""
    m, n = max(m, n), min(m, n)
    if not eqn.params["compute_uv"]:
        return min(4 * m * n**2 - 4 / 3 * n**3, 2 * m * n**2 + 2 * n**3)
    if eqn.params["full_matrices"]:
        return 4 * m**2 * n + min(8 * m * n**2 + 9 * n**3, 22 * n**3)
    return min(14 * m * n**2 + 8 * n**3, 6 * m * n**2 + 20 * n**3)


def _eig(m, n, eqn):
    vectors = eqn.params["compute_left_eigenvectors"] or eqn.params["compute_right_eigenvectors"]
    return (25 if vectors else 10) * n**3


def _names(text):
    return text.split()


# By the rows m and columns n of the first operand; leading axes are batches.
_MATRIX_PRICES = {
    "cholesky": lambda m, n, eqn: n**3 / 3,
    "cholesky_update": lambda m, n, eqn: 3 * n**2,
    "eig": _eig,
    "eigh": lambda m, n, eqn: 9 * n**3,
    "geqp3": lambda m, n, eqn: _reflectors(m, n),
    "geqrf": lambda m, n, eqn: _reflectors(m, n),
    "hessenberg": lambda m, n, eqn: 10 / 3 * n**3,
    "householder_product": _householder_product,
    "lu": _lu,
    "ormqr": _apply_reflectors,
    "qr": _qr,
    "schur": lambda m, n, eqn: (25 if eqn.params["compute_schur_vectors"] else 10) * n**3,
    "svd": _svd,
    "symmetric_product": lambda m, n, eqn: m**2 * n,
    "tridiagonal": lambda m, n, eqn: 4 / 3 * n**3,
}

_FREE = _names(
    """
    all_gather all_gather_invariant all_to_all axis_index bitcast_convert_type broadcast broadcast_in_dim complex
    concatenate convert_element_type copy copy_p create_token dce_sink debug_callback debug_print device_put
    dynamic_slice dynamic_update_slice empty empty2 expand_dims gather get imag iota layout_constraint mesh_cast name
    optimization_barrier pad pbroadcast pcast ppermute pvary ragged_all_to_all random_bits random_clone
    random_fold_in random_seed random_split random_unwrap random_wrap real ref reduce_precision reshape reshard rev
    rng_bit_generator rng_uniform scatter select_n sharding_constraint slice split squeeze stack stop_gradient swap
    tile transpose unstack
    """
)
_REDUCTIONS = _names(
    """
    argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and reduce_max reduce_min reduce_or
    reduce_prod reduce_sum reduce_xor
    """
)
_COLLECTIVE_SUMS = _names("pmax pmin psum psum_invariant reduce_scatter unreduced_psum unreduced_reduce_scatter")
_SCATTER_SUMS = _names("scatter-add scatter-sub scatter-mul scatter-min scatter-max")
_WINDOW_REDUCTIONS = _names("reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add")

_PRICES = {
    **dict.fromkeys(_FREE, lambda eqn: 0),
    **dict.fromkeys(_REDUCTIONS, _per_reduced_element),
    **dict.fromkeys(_COLLECTIVE_SUMS, _per_operand),
    **dict.fromkeys(_SCATTER_SUMS, _per_update),
    **dict.fromkeys(_WINDOW_REDUCTIONS, _per_window_element),
    **dict.fromkeys(["select_and_scatter", "select_and_scatter_add"], _scatter_windows),
    **dict.fromkeys(["sort", "top_k"], _sort),
    "addupdate": lambda eqn: _size(eqn.invars[1]),
    "approx_top_k": lambda eqn: _size(eqn.invars[0]),
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "fft": _fourier,
    "ragged_dot_general": _ragged_dot_general,
    "triangular_solve": _triangular_solve,
    "tridiagonal_solve": _tridiagonal_solve,
}
