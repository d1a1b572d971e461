r"""Kronecker factors: second moments of layers' inputs and of their output cotangents, estimated and averaged.

For a block of weights with inputs a (a one appended where a bias rides on it) and output cotangents g, the gradient of
an example is sum_r a_r g_r^T over the positions r that share the weights, and its curvature is taken to be

    E[(a (x) g)(a (x) g)^T]  ~  A (x) G,    A = E[a a^T],    G = E[g g^T]

(Martens 2016, eq. 6.1). A is the mean and G the sum over positions. Only the product of the two has a meaning: a scale
can move from one to the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_choice
from curvax.layers.blocks import Block
from curvax.layers.diagonals import entrywise, products
from curvax.layers.find import Layers
from curvax.layers.taps import TappedPoint, tap
from curvax.layers.use import LayerUse, sum_over_examples, with_ones
from curvax.matrices.curvature import Fisher, OutputCurvature, check_curvature
from curvax.objectives.objective import Objective, compiled_if_eager
from curvax.objectives.term import scale_cases
from curvax.types import Array, PyTree, Scalar

Sharing = Literal["expand", "reduce"]
Pairs = tuple[tuple[int, int], ...]


class KroneckerFactors(NamedTuple):
    """The factors of all blocks; what they belong to stands in ``Layers``, so that they are saved as they are.

    Attributes:
        inputs: For each block of ``layers.treatment.kronecker`` A, of shape (blocks, inputs, inputs); where only its
            diagonal is kept, as of embeddings, (blocks, inputs).
        outputs: For each of them G, likewise.
        diagonals: For each leaf of ``layers.treatment.diagonal`` the diagonal of its curvature, in its shape.
        cross_inputs: For each pair of neighbours of a block-tridiagonal matrix E[a_i a_j^T].
        cross_outputs: For each of them E[g_i g_j^T].
    """

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    diagonals: tuple[Array, ...]
    cross_inputs: tuple[Array, ...]
    cross_outputs: tuple[Array, ...]


def kronecker_factors(
    tapped: TappedPoint,
    key: Array | None = None,
    *,
    curvature: OutputCurvature | None = None,
    sharing: Sharing = "expand",
    pairs: Pairs = (),
) -> KroneckerFactors:
    r"""The Kronecker factors of all layers at a point, by the forward pass and backward sweeps of the curvature.

    Which matrix they approximate is ``curvature``'s to say. One sweep for each draw or column, and all examples apart:

    - ``Fisher(num_samples=1)``: targets drawn from the model's own distribution, one sweep (Martens 2016, section 6.5).
    - ``Fisher()``, ``GaussNewton()``: exactly, by a sweep for each column of the loss's root, the outputs of a class.
    - ``GaussNewton(num_samples=1)``: noise propagated backwards from the outputs, one sweep.
    - ``EmpiricalFisher()``: the gradients at the training targets. It is not the Fisher matrix, and a poor stand-in.

    Where positions share weights (steps of a sequence, pixels, several uses), "expand" takes every position for a case
    of its own, exact where each has a loss of its own, and "reduce" adds up over them first, exact for a linear layer
    whose outputs are averaged (Eschenhagen et al. 2023). Examples, and steps where a mask or weights single them out,
    count by the factor of their loss in A as in G; "reduce" takes the mean of the inputs of all steps. Several uses of
    the same weights and embeddings are always expanded. Weights with exchanged roles, an output head tied to an
    embedding, are brought to the scales of the first use before they are added, so that the trace is that of the sum.

    Args:
        key: For a curvature that draws.
        curvature: ``curvax.Fisher(num_samples=1)`` if None.
        pairs: Blocks, by their places, between which cross factors are wanted.

    Returns:
        The ``KroneckerFactors``, without the penalty's part.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> factors = curvax.layers.kronecker_factors(tapped, curvature=curvax.GaussNewton())
        >>> factors.inputs[0], factors.outputs[0]
        (Array([[[ 5.,  7.],
                [ 7., 10.]]], dtype=float...), Array([[[1.]]], dtype=float...))

    Source: Martens and Grosse 2015; Martens 2016, sections 6.3 and 6.5.
    """
    curvature = Fisher(num_samples=1) if curvature is None else curvature
    check_curvature("kronecker_factors", curvature, OutputCurvature)
    check_choice("kronecker_factors: sharing", sharing, get_args(Sharing))
    return compiled_if_eager(_factors, tapped.point, key, layers=tapped.layers, how=(curvature, sharing, pairs))


def _factors(point, key, *, layers, how):
    curvature, sharing, pairs = how
    tapped = tap(layers, point)
    return factors_of(tapped, key, curvature, sharing, pairs)


class SomePositions(NamedTuple):
    """How many of the positions that share weights a second moment of inputs is estimated from.

    The inputs of a convolution at all positions of all images are many times as many as its second moment has rows, and
    that moment is the dearest part of the factors. A running average sees others of them every time.

    Attributes:
        key: Where they begin, which is drawn; they are then at even distances.
        rows_per_input: So many rows for each input are enough,
        least: but no fewer than these in all.
    """

    key: Array
    rows_per_input: int
    least: int


def factors_of(
    tapped: TappedPoint,
    key: Any,
    curvature: OutputCurvature,
    sharing: Sharing,
    pairs: Pairs,
    some: SomePositions | None = None,
):
    """``kronecker_factors`` without checks, inside of a program; moments of inputs by ``some`` of their positions."""
    tapped, layers = tapped.definite(), tapped.layers

    def of_cotangents(uses):
        return (
            [
                [_of_cotangents(_reduced(use, sharing), block) for use in own]
                for block, own in uses_by_block(tapped, uses)
            ],
            _diagonals(tapped, uses),
            tuple(_cross_cotangents(*_uses_of_pair(tapped, uses, pair, sharing)) for pair in pairs),
        )

    cotangents, diagonals, cross_outputs = sum_over_sweeps(tapped, key, curvature, of_cotangents)
    if layers.fallback == "diagonal" and layers.unstructured:
        diagonals = _without_structure(tapped, key, curvature, diagonals)
    scales = [cases.scale for cases in tapped.point.cases]
    forward = without_cotangents(tapped, None if some is None or sharing == "reduce" else _places_of(some, scales))
    inputs, outputs = [], []
    for (block, own), moments in zip(uses_by_block(tapped, forward), cotangents, strict=True):
        data = [_of_inputs(_reduced(use, sharing), block, scales[use.term]) for use in own]
        a, g = _balanced(
            _pair([(d, c) for use, d, c in zip(own, data, moments, strict=True) if not use.swapped]),
            _pair([(d, c) for use, d, c in zip(own, data, moments, strict=True) if use.swapped]),
        )
        dtype = _dtype(layers, block)
        inputs.append(a.astype(dtype))
        outputs.append(g.astype(dtype))
    cross_inputs = []
    for pair in pairs:
        left, right = _uses_of_pair(tapped, forward, pair, sharing)
        own = [layers.treatment.kronecker[place] for place in pair]
        cross_inputs.append(_cross_inputs(left, right, own, scales[left.term]).astype(_dtype(layers, own[0])))
    cross_outputs = tuple(
        cross.astype(_dtype(layers, layers.treatment.kronecker[pair[0]]))
        for cross, pair in zip(cross_outputs, pairs, strict=True)
    )
    return KroneckerFactors(tuple(inputs), tuple(outputs), diagonals, tuple(cross_inputs), cross_outputs)


def zero_factors(layers: Layers, pairs: Pairs = ()) -> KroneckerFactors:
    """Factors of zeros, to begin an average with; from shapes alone."""

    def zeros(block, side):
        blocks, *sizes = block.shape
        size = (sizes[side],) if block.diagonal_factors[side] else (sizes[side],) * 2
        return jnp.zeros((blocks, *size), _dtype(layers, block))

    treatment = layers.treatment
    inputs, outputs = (tuple(zeros(block, side) for block in treatment.kronecker) for side in (0, 1))
    structs = [layers.structs[place] for place in treatment.diagonal]
    diagonals = tuple(jnp.zeros(struct.shape, trees.wide_dtype(struct)) for struct in structs)
    blocks = [(treatment.kronecker[i], treatment.kronecker[j]) for i, j in pairs]
    of_inputs, of_outputs = (
        tuple(jnp.zeros((a.shape[side], b.shape[side]), _dtype(layers, a)) for a, b in blocks) for side in (1, 2)
    )
    return KroneckerFactors(inputs, outputs, diagonals, of_inputs, of_outputs)


def average_factors(old: KroneckerFactors, new: KroneckerFactors, count: Scalar, *, decay: Scalar = 0.95):
    r"""epsilon old + (1 - epsilon) new with epsilon = min(1 - 1/k, decay): the running average of K-FAC.

    The first k - 1 weights of a mean while it is short, then an exponential average; k = 1 takes the new ones alone, so
    nothing is to be corrected for its start. New factors that are not finite leave the old ones.

    Args:
        count: k, from 1.

    Example:
        >>> old, new = (curvax.layers.KroneckerFactors((jnp.full((1, 1, 1), x),), (), (), (), ()) for x in (1.0, 3.0))
        >>> curvax.layers.average_factors(old, new, 2).inputs[0].item()
        2.0

    Source: Martens 2016, section 6.5.
    """
    return running_average(old, new, count, decay, factors_are_finite(new))


def running_average(old: PyTree, new: PyTree, count: Scalar, decay: Scalar, finite: Array) -> PyTree:
    """``average_factors`` for any pytrees; where ``new`` is not ``finite`` the old one."""

    def blend(a, b):
        k = jnp.asarray(count).astype(a.dtype)
        keep = jnp.minimum(1 - 1 / k, jnp.asarray(decay, a.dtype))
        # Zero times what is not finite is not zero: a first average drops what was there.
        return jnp.where(finite, jnp.where(k <= 1, b.astype(a.dtype), keep * a + (1 - keep) * b.astype(a.dtype)), a)

    return jax.tree.map(blend, old, new)


def factors_are_finite(factors: KroneckerFactors) -> Array:
    """Whether all factors are finite: no entry of a second moment is above the largest of its diagonal."""
    return trees.all_finite(list(map(diagonals_of, factors.inputs + factors.outputs)), factors.diagonals)


def sides_are_finite(sides: Iterable[tuple[Array, Array]]) -> Array:
    """For each pair of inverses of factors, whether both are finite, (pairs,); by their diagonals likewise."""
    rows = [jnp.concatenate([diagonals_of(side).ravel() for side in pair]) for pair in sides]
    longest = max((row.size for row in rows), default=0)
    return trees.are_finite(*[jnp.pad(row, (0, longest - row.size)) for row in rows])


def diagonals_of(factor: Array) -> Array:
    """The diagonal of each matrix of a stack, (blocks, n); a diagonal factor is one itself.

    By a strided slice: ``jnp.diagonal`` makes an array of indices and gathers.
    """
    if factor.ndim == 2:
        return factor
    blocks, n, _ = factor.shape
    return factor.reshape(blocks, n * n)[:, :: n + 1]


def factors_over_batches(
    layers: Layers,
    objective: Objective,
    params: PyTree,
    batches: Iterable[PyTree],
    key: Array | None = None,
    *,
    curvature: OutputCurvature | None = None,
    sharing: Sharing = "expand",
    pairs: Pairs = (),
) -> KroneckerFactors:
    r"""The factors of all batches of a data set together: means over all examples, one pass, no optimiser.

    Each batch counts by its cases and their weights, exact where a layer stands in one term; the work on one batch is
    compiled once for each of its shapes. The result is a pytree of arrays, saved as it is.

    Args:
        batches: Batches as for ``objective``; they are read once, so a generator will do.
        pairs: Blocks between which cross factors are wanted, for ``BlockTridiagonal().pairs(layers)`` those of its
            inverse.

    Raises:
        ValueError: There are no batches.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batches = [(jnp.full((n, 1), x), jnp.zeros((n, 1))) for n, x in ((1, 1.0), (3, 2.0))]
        >>> layers = curvax.find_layers(objective, jnp.zeros((1, 1)), batches[0])
        >>> factors = curvax.layers.factors_over_batches(
        ...     layers, objective, jnp.zeros((1, 1)), batches, curvature=curvax.GaussNewton())
        >>> factors.inputs[0].item()                                         # (1 + 3 * 4) / 4
        3.25
    """
    curvature = Fisher(num_samples=1) if curvature is None else curvature
    check_curvature("factors_over_batches", curvature, OutputCurvature)
    check_choice("factors_over_batches: sharing", sharing, get_args(Sharing))

    @jax.jit
    def one(params, batch, key):
        at = objective.linearize(params, batch)
        return factors_of(tap(layers, at), key, curvature, sharing, pairs), _masses(layers, at, pairs)

    # A running mean, by the share of this batch in all that were read.
    @jax.jit
    def joined(total, mass, own, count):
        mass = trees.add(mass, count)
        return jax.tree.map(_mix, total, own, count, mass), mass

    read = None
    for index, batch in enumerate(batches):
        own = one(params, batch, None if key is None else jax.random.fold_in(key, index))
        read = own if read is None else joined(*read, *own)
    if read is None:
        raise ValueError("factors_over_batches got no batches")
    return read[0]


# --- sweeps ---------------------------------------------------------------------------------------------------------


def sum_over_sweeps(
    tapped: TappedPoint, key: Any, curvature: OutputCurvature, function: Callable[[list[LayerUse]], PyTree]
) -> PyTree:
    """The sum of ``function(uses)`` over the backward sweeps of a curvature, one for each draw or column.

    The cotangents of every case are multiplied by the root of its factor, so that second moments have its share.
    """
    if getattr(curvature, "num_samples", None) is None and max(tapped.layers.rows_per_example) > 1:
        # One sweep seeds all rows of an example at once, whose products only draws of every row's own average away.
        tapped.check_separate(f"Kronecker factors of {curvature}, without num_samples,")
    pieces = tapped.definite().point.pieces(curvature.keys(tapped.point, key))
    columns = [curvature.columns(piece) for piece in pieces]

    def sweep(index):
        seeds = (
            scale_cases(jnp.sqrt(piece.scale), column(index))
            for piece, (_, column) in zip(pieces, columns, strict=True)
        )
        return function(tapped.pull_back(tuple(seeds)))

    total = sweep(jnp.asarray(0))
    count = max(number for number, _ in columns)
    if count == 1:
        return total
    return jax.lax.scan(lambda total, i: (trees.add(total, sweep(i)), None), total, jnp.arange(1, count))[0]


def uses_by_block(tapped: TappedPoint, uses: list[LayerUse]) -> list[tuple[Block, list[LayerUse]]]:
    """The blocks with Kronecker factors, each with its uses."""
    groups = tapped.by_layer(uses)
    blocks = tapped.layers.treatment.kronecker
    return [(block, [block.arranged(use) for use in groups[block.weights.name]]) for block in blocks]


# --- the two sides --------------------------------------------------------------------------------------------------


def without_cotangents(tapped: TappedPoint, places: Any = None) -> list[LayerUse]:
    """The uses with what the forward pass gives, inputs as ``capture`` says; cotangents are zeros that nobody reads."""
    zeros = [[geometry.use.zeros() for geometry in tap.uses] for tap in tapped.taps]
    return tapped.capture(zeros, places=places)


def _places_of(some, scales):
    """At which positions the inputs of a use are taken, for ``TappedPoint.capture``.

    At all where there is a factor for every step: the steps that are chosen might be ones that do not count.
    """

    def places(member, geometry, shape):
        (_, examples, positions, _), scale = shape, scales[member.term]
        if member.swapped or geometry.use.kind not in ("dense", "conv") or scale.size not in (1, examples):
            return None
        enough = -(-max(some.rows_per_input * geometry.shape[1], some.least) // examples)
        distance = max(1, positions // max(enough, 1))
        while math.gcd(distance, positions) > 1:  # a divisor of the sides of images would see some columns of them
            distance -= 1
        if distance == 1:
            return None
        first = jax.random.randint(some.key, (), 0, positions)
        return (first + distance * jnp.arange(positions // distance)) % positions

    return places


def _of_inputs(use, block, scale):
    """sum_nr w_nr a_nr a_nr^T with the factors w of the cases, and the sum of those: of one use, on its side.

    Inputs may be those of some positions, alike in their weights, which stand for all.
    """
    weights, total = _weights(use, scale)
    share = use.cotangents.shape[2] / use.inputs.shape[2]
    scale, weights = scale * share, None if weights is None else weights * share
    if use.swapped:
        factor = use.output_factor(weights, diagonal=block.diagonal_factors[1])
    else:
        homogeneous = block.bias is not None
        factor = use.input_factor(weights, homogeneous=homogeneous, diagonal=block.diagonal_factors[0])
    if weights is None:
        factor = factor * scale.astype(factor.dtype)
    return _as(factor, block.diagonal_factors[int(use.swapped)]), total


def _of_cotangents(use, block):
    """sum_nr g_nr g_nr^T of one use, on the other side; cotangents have the roots of the factors of their cases."""
    if use.swapped:
        return _as(use.input_factor(diagonal=block.diagonal_factors[0]), block.diagonal_factors[0])
    return _as(use.output_factor(diagonal=block.diagonal_factors[1]), block.diagonal_factors[1])


def _weights(use, scale):
    """The factors of a use's rows, for every example or every position of it, None where alike; and their sum.

    Where the steps of a sequence are the cases, a use with as many positions has a step at each, so that inputs at
    steps that are left out do not count; others share the factors of their example.
    """
    examples, positions = use.cotangents.shape[1:3]
    if scale.ndim == 0:
        return None, scale * (examples * positions)
    cases = scale.reshape(examples, -1)
    total = positions * jnp.sum(cases)
    if 1 < cases.shape[1] == positions:
        return positions * cases, total
    return jnp.sum(cases, axis=1), total


def _diagonals(tapped, uses):
    """The diagonals of the leaves that have no Kronecker factors, as far as they have structure."""
    places = tapped.layers.treatment.diagonal
    own = [use for use in uses if set(places) & set(use.layer.leaves)]
    # Of the inputs: the outputs have several rows for each where steps are folded into the axis of the examples.
    counts = {use.term: use.cotangents.shape[1] for use in own}
    ones = [jnp.ones(counts.get(i, 0)) for i in range(len(tapped.taps))]
    leaves = jax.tree.leaves(products(tapped, own, own, ones) if own else trees.zeros_like(tapped.point.params))
    return tuple(leaves[i].astype(trees.wide_dtype(leaves[i])) for i in places)


def _without_structure(tapped, key, curvature, diagonals):
    """The diagonals with those of parameters without structure, which forward passes give."""
    pieces = tapped.point.pieces(curvature.keys(tapped.point, key))
    matrices = [curvature.output_matrix(piece) for piece in pieces]

    def quadratic(tangents):
        parts = zip(pieces, matrices, tangents, strict=True)
        return sum(trees.vdot(scale_cases(piece.scale, t), matrix.product(t)) for piece, matrix, t in parts)

    exact = jax.tree.leaves(entrywise(tapped, quadratic))
    places = tapped.layers.treatment.diagonal
    return tuple(d + exact[place].astype(d.dtype) for d, place in zip(diagonals, places, strict=True))


def _pair(moments):
    """(A, G) of uses that have the same roles: the mean of their rows of inputs, the sum of those of cotangents."""
    if not moments:
        return None
    total = sum(weight for (_, weight), _ in moments)
    inputs = functools.reduce(jnp.add, [a for (a, _), _ in moments])
    return inputs / jnp.where(total == 0, 1, total).astype(inputs.dtype), functools.reduce(
        jnp.add, [g for _, g in moments]
    )


def _balanced(direct, swapped):
    """(A, G) of a block from (A_1, G_1) of direct uses and (G_2, A_2) of those with exchanged roles.

    The second pair is brought to the ratio of the traces of the first, which leaves its product alone; then the sum of
    the products is nearly the product of the sums, and gets its trace.
    """
    if swapped is None:
        assert direct is not None  # a block has a use
        return direct
    g, a = swapped  # those on the block's outputs come from inputs
    if direct is None:
        return a, g
    ta, tg, oa, og = (_trace(x) for x in (*direct, a, g))
    one, other = ta * tg > 0, oa * og > 0
    both = one & other
    ta, tg, oa, og = (jnp.where(both, t, 1) for t in (ta, tg, oa, og))
    move = jnp.sqrt(ta * og / (tg * oa))
    whole = jnp.where(both, (ta * tg + oa * og) / jnp.square(jnp.sqrt(ta * tg) + jnp.sqrt(oa * og)), 1)
    # A pair whose product vanishes has no part in the sum, whichever of its factors it was.
    left = jnp.where(_spread(one | ~other, a), direct[0], 0) + jnp.where(_spread(other, a), a * _spread(move, a), 0)
    right = jnp.where(_spread(one | ~other, g), direct[1], 0) + jnp.where(_spread(other, g), g / _spread(move, g), 0)
    return left, right * _spread(whole, g)


def _reduced(use: LayerUse, sharing: Sharing) -> LayerUse:
    """The use with its positions added up: cotangents by their sum, inputs by their mean."""
    if sharing == "expand" or use.kind == "embedding" or use.cotangents.shape[2] == 1:
        return use
    assert use.inputs is not None
    return use._replace(
        inputs=jnp.mean(use.inputs, axis=2, keepdims=True), cotangents=jnp.sum(use.cotangents, axis=2, keepdims=True)
    )


def _uses_of_pair(tapped, uses, pair, sharing):
    """The uses of two blocks that have one each."""
    blocks = uses_by_block(tapped, uses)
    (left,), (right,) = (blocks[place][1] for place in pair)
    if left.term != right.term or left.cotangents.shape[2] != right.cotangents.shape[2]:
        names = " and ".join(repr(blocks[place][0].name) for place in pair)
        raise ValueError(f"{names} have no cross factors: they are of two terms, or have other numbers of positions")
    return _reduced(left, sharing), _reduced(right, sharing)


def _cross_inputs(left, right, pair_blocks, scale):
    """E[a_i a_j^T]."""
    a, b = (
        with_ones(use.inputs[0]) if block.bias is not None else use.inputs[0]
        for use, block in zip((left, right), pair_blocks, strict=True)
    )
    weights, total = _weights(left, scale)
    weights = scale if weights is None else weights
    weights = weights.reshape(*weights.shape, *(1,) * (3 - weights.ndim)).astype(a.dtype)
    products = sum_over_examples("bnri,bnrj->bij", (a * weights)[None], b[None])[0]
    return products / jnp.where(total == 0, 1, total).astype(a.dtype)


def _cross_cotangents(left, right):
    """E[g_i g_j^T]."""
    return sum_over_examples("bnri,bnrj->bij", left.cotangents, right.cotangents)[0]


def _as(factor, diagonal):
    """A factor as it is kept: the counts of an embedding are a diagonal even where a matrix is wanted."""
    return jax.vmap(jnp.diag)(factor) if factor.ndim == 2 and not diagonal else factor


def _trace(factor):
    return jnp.sum(diagonals_of(factor), axis=-1)


def _spread(scalars, factor):
    return scalars.reshape(-1, *(1,) * (factor.ndim - 1))


def _masses(layers, at, pairs):
    """What each of the factors of a batch counts by: A is a mean by the weights of the cases, G one by their number."""
    number = [cases.num_cases for cases in at.cases]
    weight = [
        n * jnp.sum(jnp.abs(cases.scale)) * (at.num_examples(i) if cases.scale.ndim == 0 else 1)
        for i, (n, cases) in enumerate(zip(number, at.cases, strict=True))
    ]

    def of(members, masses):
        return functools.reduce(jnp.add, [masses[term] for term in sorted({member.term for member in members})])

    blocks, treatment = layers.treatment.kronecker, layers.treatment
    users = [[m for layer in layers if place in layer.leaves for m in layer.members] for place in treatment.diagonal]
    everywhere = functools.reduce(jnp.add, number)
    crossed = [blocks[left].weights.members for left, _ in pairs]  # both blocks of a pair are of one term
    return KroneckerFactors(
        tuple(of(block.weights.members, weight) for block in blocks),
        tuple(of(block.weights.members, number) for block in blocks),
        tuple(of(members, number) if members else everywhere for members in users),
        tuple(of(members, weight) for members in crossed),
        tuple(of(members, number) for members in crossed),
    )


def _mix(old, new, own, whole):
    """The mean with what came last, whose share of the whole mass is given."""
    return old + (own / jnp.where(whole > 0, whole, 1)).astype(old.dtype) * (new - old)


def _dtype(layers, block):
    return trees.wide_dtype(*(layers.structs[place] for place in block.leaves))
