"""Whether examples are coupled: every operation against what a change of one example does to the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax

NUM = 6
WEIGHTS = jax.random.normal(jax.random.key(0), (4, 3))
INPUTS = jax.random.normal(jax.random.key(1), (NUM, 4))
TARGETS = jnp.zeros((NUM, 3))


def _attention(h):
    t = h[:, :, None] * jnp.ones((1, 1, 2))
    return jnp.einsum("nij,njk->nik", jax.nn.softmax(jnp.einsum("nik,njk->nij", t, t), axis=-1), t)[:, :, 0]


def _siamese(h):
    both = jnp.tanh(jnp.concatenate([h, 2 * h]))
    return both[: len(h)] * both[len(h) :]


def _own_rows(h):
    return h * h[jnp.arange(len(h)), jnp.argmax(h, 1)][:, None]


def _own_steps(h):
    return h * (h[:, :, None] * jnp.ones((1, 1, 2)))[jnp.arange(len(h)), jnp.argmax(h, 1) - 1][:, :1]


def _sharded(function, spec):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)


def _synchronised(z):
    return z - jax.lax.pmean(z.mean(0), "d")


def _noisy(key, row):
    key, own = jax.random.split(jax.random.wrap_key_data(key))
    return jax.random.key_data(key), row + jax.random.normal(own, row.shape, row.dtype)


def _inner_step(row):
    def convolved(kernel):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(row[None, :, None], kernel, (1,), "SAME", dimension_numbers=numbers)

    kernel = jnp.ones((3, 1, 2), row.dtype)
    kernel = kernel - 0.1 * jax.grad(lambda k: jnp.mean(jnp.tanh(convolved(k)) ** 2))(kernel)
    return convolved(kernel)[0, :, 0]


@jax.custom_jvp
def _reversed(h):
    return h[::-1]


_reversed.defjvp(lambda primals, tangents: (_reversed(*primals), _reversed(*tangents)))

OPERATIONS = {
    # along the examples
    "softmax": lambda h: jax.nn.softmax(h, axis=0),
    "mean": lambda h: h - h.mean(0),
    "largest": lambda h: h / jnp.max(jnp.abs(h)),
    "sort": lambda h: jnp.sort(h, axis=0),
    "sort of pairs": lambda h: jax.lax.sort((h, 2 * h), dimension=0, num_keys=1)[1],
    "ranks": lambda h: h * jnp.argsort(h[:, 0])[:, None].astype(h.dtype),
    "median": lambda h: h - jnp.median(h, axis=0),
    "cumsum": lambda h: jnp.cumsum(h, axis=0),
    "cummax": lambda h: jax.lax.cummax(h, axis=0),
    "roll": lambda h: jnp.roll(h, 1, axis=0),
    "reversal": lambda h: h[::-1],
    "pad": lambda h: jnp.pad(h, ((1, 0), (0, 0)))[:-1],
    "shift": lambda h: jnp.concatenate([h[1:], h[:1]]),
    "permutation": lambda h: h[jnp.argsort(h[:, 0])],
    "other rows": lambda h: h * h[len(h) - 1 - jnp.arange(len(h)), jnp.argmax(h, 1)][:, None],
    "scatter by ranks": lambda h: h.at[jnp.argsort(h[:, 0]), jnp.argmax(h, 1)].set(0.0),
    "first example": lambda h: h * h[0],
    "window": lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (2, 1), (1, 1), "SAME"),
    "gram": lambda h: (h @ h.T) @ h,
    "pairwise": lambda h: jnp.sum(jnp.abs(h[:, None] - h[None]), axis=1),
    "scan over examples": lambda h: jax.lax.scan(lambda c, x: (c + x, c + x), jnp.zeros(3), h)[1],
    "convolution": lambda h: jax.lax.conv_general_dilated(h.T[None], jnp.ones((3, 3, 3)), (1,), "SAME")[0].T,
    "fourier": lambda h: jnp.real(jnp.fft.fft(h, axis=0)),
    "covariance": lambda h: h @ jnp.linalg.inv(h.T @ h + jnp.eye(3)),
    "collective": lambda h: jax.vmap(lambda r: r - jax.lax.pmean(r, "b"), axis_name="b")(h),
    "in a branch": lambda h: jax.lax.cond(True, lambda z: jnp.cumsum(z, axis=0), lambda z: z, h),
    "in a loop": lambda h: jax.lax.fori_loop(0, 2, lambda _, z: jnp.flip(z, 0) + z, h),
    "in a condition": lambda h: jax.lax.while_loop(lambda z: jnp.max(jnp.abs(z)) > 0.5, lambda z: z / 2, h),
    "in jit": jax.jit(lambda h: jnp.cumsum(h, axis=0)),
    "in a custom rule": _reversed,
    "wrong unfolding": lambda h: jnp.tanh(h.reshape(-1, 1)).reshape(3, -1).T,
    "wrong reshape": lambda h: h.reshape(3, -1).T,
    "transposed in a reshape": lambda h: jax.lax.reshape(h, h.shape, dimensions=(1, 0)),
    "first half of repeated": lambda h: jnp.repeat(h, 2, axis=0)[: len(h)],
    "every second of joined": lambda h: jnp.concatenate([h, 2 * h])[::2],
    "solve": lambda h: jnp.linalg.solve(jnp.eye(len(h)) + 0.1, h),
    "iterative solve": lambda h: jax.scipy.sparse.linalg.cg(lambda v: 3 * v - jnp.roll(v, 1, 0), h, maxiter=2)[0],
    "sharded": lambda h: _sharded(lambda z: jnp.cumsum(z, 0), jax.sharding.PartitionSpec())(h),
    "synchronised": lambda h: _sharded(_synchronised, jax.sharding.PartitionSpec("d"))(h),
    "gathered": lambda h: jax.vmap(lambda r: r + jax.lax.all_gather(r, "b").sum(0), axis_name="b")(h),
    "linear call": lambda h: jax.custom_derivatives.linear_call(
        lambda _, z: jnp.cumsum(z, 0), lambda _, z: jnp.cumsum(z[::-1], 0)[::-1], (), h
    ),
    # within them
    "nothing": lambda h: h,
    "softmax within": jax.nn.softmax,
    "gelu": jax.nn.gelu,
    "standardise within": lambda h: jax.nn.standardize(h, axis=-1),
    "sort within": lambda h: jnp.sort(h, axis=1),
    "cumsum within": lambda h: jnp.cumsum(h, axis=1),
    "cumsum of transposed": lambda h: jnp.cumsum(h.T, axis=0).T,
    "roll within": lambda h: jnp.roll(h, 1, axis=1),
    "pad within": lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :3],
    "window within": lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME"),
    "top k within": lambda h: h * jax.lax.top_k(h, 1)[0],
    "one hot": lambda h: jax.nn.one_hot(jnp.argmax(h, 1), 3) * h,
    "rows along an axis": lambda h: jnp.take_along_axis(h, jnp.argsort(h, axis=1), axis=1),
    "own rows": _own_rows,
    "own steps": _own_steps,
    "own rows, two of each": lambda h: h[:, :2] * h[jnp.arange(len(h))[:, None], jax.lax.top_k(h, 2)[1]],
    "own rows by numpy": lambda h: h * h[np.arange(len(h)), jnp.argmax(h, 1)][:, None],
    "other rows by numpy": lambda h: h * h[np.arange(len(h))[::-1], jnp.argmax(h, 1)][:, None],
    "own rows under jit": jax.jit(_own_rows),
    "set in own rows": lambda h: h.at[jnp.arange(len(h)), jnp.argmax(h, 1)].set(0.0),
    "rows under vmap": lambda h: h * jax.vmap(lambda r: r[jnp.argmax(r)])(h)[:, None],
    "slice under vmap": lambda h: h * jax.vmap(lambda r: jax.lax.dynamic_slice(r, (jnp.argmax(r),), (1,)))(h),
    "set under vmap": jax.vmap(lambda r: r.at[jnp.argmax(r)].set(0.0)),
    "convolution under vmap": jax.vmap(lambda r: jnp.convolve(r, r[:2], mode="same")),
    "solve under vmap": jax.vmap(lambda r: jnp.linalg.solve(3 * jnp.eye(3) + jnp.outer(r, r), r)),
    "attention": _attention,
    "two towers": _siamese,
    "two towers by split": lambda h: jnp.multiply(*jnp.split(jnp.tanh(jnp.concatenate([h, 2 * h])), 2)),
    "every second row": lambda h: jnp.repeat(h, 2, axis=0)[::2],
    "folded and unfolded": lambda h: jnp.tanh(h.reshape(-1, 1)).reshape(-1, 3),
    "folded the other way": lambda h: jnp.tanh(h.T.reshape(-1, 1)).reshape(3, -1).T,
    "scan over steps": lambda h: jax.lax.scan(lambda c, x: (jnp.tanh(c + x), c), h[:, 0], h.T)[0][:, None] * h,
    "map over examples": lambda h: jax.lax.map(jnp.cumsum, h),
    "scan over examples with a key": lambda h: jax.lax.scan(_noisy, jax.random.key_data(jax.random.key(0)), h)[1],
    "nothing joined": lambda h: jnp.concatenate([jnp.zeros((0, 3), h.dtype), h]),
    "barrier": lambda h: jax.lax.optimization_barrier((h, jnp.ones(3, h.dtype)))[0],
    "tridiagonal under vmap": jax.vmap(
        lambda r: jax.lax.linalg.tridiagonal_solve(jnp.zeros_like(r), 2 + r * r, jnp.zeros_like(r), r[:, None])[:, 0]
    ),
    "gradient step of a kernel": jax.vmap(lambda r: _inner_step(r)),
    "loop": lambda h: jax.lax.fori_loop(0, 3, lambda _, z: jnp.tanh(z), h),
    "branch": lambda h: jax.lax.cond(True, lambda z: jnp.cumsum(z, axis=1), lambda z: z, h),
}


@functools.cache
def _really_couples(name):
    """Whether another example changes, for some of several draws of one of them."""
    h = jax.random.normal(jax.random.key(2), (NUM, 3))

    run = jax.jit(OPERATIONS[name])
    before, draws = np.asarray(run(h)), np.random.default_rng(0)
    for example in range(NUM):
        changed = np.array(h)
        changed[example] = 3 * draws.normal(size=3)
        if np.max(np.abs(np.delete(np.asarray(run(changed)) - before, example, axis=0))) > 1e-9:
            return True
    return False


@pytest.mark.parametrize("name", OPERATIONS)
def test_coupling_is_what_a_change_of_one_example_does_to_others(name):
    objective = curvax.Objective(lambda w, x: OPERATIONS[name](x @ w), curvax.losses.squared_error())
    layers = curvax.find_layers(objective, WEIGHTS, (INPUTS, TARGETS))
    assert layers.couples_examples == _really_couples(name), layers.coupled_by


@pytest.mark.parametrize("reversed_parts", [lambda h: jnp.concatenate(jnp.split(h, len(h))[::-1]), None])
def test_programs_with_parts_for_each_example(reversed_parts):
    """As many operands as examples: refused by name where it stands, coupled inside of a call."""
    within = reversed_parts is None
    parts = jax.jit(lambda h: jnp.concatenate(jnp.split(h, len(h))[::-1])) if within else reversed_parts
    objective = curvax.Objective(lambda w, x: parts(x @ w), curvax.losses.squared_error())
    if within:
        assert curvax.find_layers(objective, WEIGHTS, (INPUTS, TARGETS)).couples_examples
    else:
        with pytest.raises(ValueError, match="computes differently for different numbers of examples"):
            curvax.find_layers(objective, WEIGHTS, (INPUTS, TARGETS))


@pytest.mark.parametrize(
    "pairs",
    [
        lambda h: -jnp.sum((h[:, None] - h[None]) ** 2, axis=-1),
        lambda h: jnp.broadcast_to(h[None], (len(h), *h.shape)).sum(-1),
        lambda h: h @ h.T,
    ],
)
def test_an_output_for_every_pair_of_examples(pairs):
    """As of a contrastive model: the loss of an example is of all."""
    objective = curvax.Objective(lambda w, x: pairs(x @ w), curvax.losses.softmax_cross_entropy())
    layers = curvax.find_layers(objective, WEIGHTS, (INPUTS, jnp.arange(NUM)))
    assert layers.couples_examples


def test_the_operation_is_named_and_single_examples_are_refused():
    objective = curvax.Objective(lambda w, x: jnp.cumsum(x @ w, axis=0), curvax.losses.squared_error())
    layers = curvax.find_layers(objective, WEIGHTS, (INPUTS, TARGETS))
    assert "couples examples by `cumsum`" in str(layers)
    with pytest.raises(ValueError, match=r"couples examples by `cumsum`.*take_along_axis"):
        curvax.gram(curvax.tap(layers, objective.linearize(WEIGHTS, (INPUTS, TARGETS))))


def test_what_is_summed_over_examples_and_not_returned_couples_nothing():
    def model(w, x):
        h = x @ w
        return h, {"mean": jnp.mean(h, axis=0)}

    objective = curvax.Objective(model, curvax.losses.squared_error(), has_aux=True)
    assert not curvax.find_layers(objective, WEIGHTS, (INPUTS, TARGETS)).couples_examples


def test_a_recurrence_over_examples_with_weights_inside():
    def model(w, x):
        def step(c, row):
            c = jnp.tanh(row @ w + c)
            return c, c

        return jax.lax.scan(step, jnp.zeros(3), x)[1]

    objective = curvax.Objective(model, curvax.losses.squared_error())
    assert curvax.find_layers(objective, WEIGHTS, (INPUTS, TARGETS), fallback="gradient").coupled_by == "scan"
