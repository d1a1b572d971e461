"""Complex outputs are pairs of real ones: everything against dense matrices of the real and imaginary parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses
from tests.tolerances import rounding

N = 5


def amplitude(params, x):
    """One complex number for each example, its logarithm's modulus and phase by two heads."""
    hidden = jnp.tanh(x @ params["w"])
    return jnp.exp(jax.lax.complex(hidden @ params["modulus"], hidden @ params["phase"]))


def spectrum(params, x):
    """The Fourier transform of a signal, as of what a scanner measures."""
    return jnp.fft.rfft(jnp.tanh(x @ params["w"]) * params["modulus"], axis=1)


def rotated(params, x):
    """A real network turned by a constant phase: a complex number next to a real one."""
    return jnp.tanh(x @ params["w"]) * (params["modulus"] + 1j * params["phase"]) * np.exp(0.3j)


MODELS = pytest.mark.parametrize("model", [amplitude, spectrum, rotated])


def setting(model, loss, dtype=jnp.float64, real_targets=False, **options):
    generator = np.random.default_rng(0)
    shapes = {"w": (3, 4), "modulus": (4,), "phase": (4,)}
    params = {name: jnp.asarray(generator.normal(size=shape), dtype) for name, shape in shapes.items()}
    x = jnp.asarray(generator.normal(size=(N, 3)), dtype)
    with jax.numpy_dtype_promotion("standard"):
        z = jax.eval_shape(model, params, x)
    y = generator.normal(size=z.shape) + (0 if real_targets else 1j * generator.normal(size=z.shape))
    return curvax.Objective(model, loss, **options), params, (x, jnp.asarray(y, jnp.float64 if real_targets else None))


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def dense(model, params, batch, weights):
    """Loss, gradient, G, H and the gradient of each example of sum_i weights_i |z_i - y_i|^2 / 2, by autodiff."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params))
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]
    x, y = jnp.asarray(batch[0], jnp.float64), jnp.asarray(batch[1], jnp.complex128)

    def parts(vector):
        pieces = [p.reshape(leaf.shape) for p, leaf in zip(jnp.split(vector, sizes), leaves, strict=True)]
        z = (model(treedef.unflatten(pieces), x) - y).reshape(N, -1)
        return jnp.concatenate([z.real, z.imag], axis=1)

    def loss(vector):
        return jnp.sum(weights[:, None] * parts(vector) ** 2) / 2

    @jax.jit
    def compute(vector):
        residuals, jacobian = parts(vector), jax.jacfwd(parts)(vector)
        each = jnp.einsum("nc,ncp->np", residuals, jacobian)
        matrix = jnp.einsum("n,ncp,ncq->pq", weights, jacobian, jacobian)
        return loss(vector), jax.grad(loss)(vector), matrix, jax.hessian(loss)(vector), each

    return [np.asarray(a) for a in compute(jnp.concatenate([leaf.ravel() for leaf in leaves]))]


def half_square(z, y):
    return jnp.sum(jnp.abs(z - y) ** 2) / 2


LOSSES = {"squared_error": losses.squared_error(), "from_function": losses.from_function(half_square, convex=True)}


@MODELS
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("real_targets", [False, True], ids=["complex targets", "real targets"])
def test_loss_gradient_and_curvature_are_those_of_the_real_and_imaginary_parts(model, loss, real_targets):
    weights = np.array([0.5, 2.0, 1.0, 0.0, 3.0])
    objective, params, batch = setting(
        model, LOSSES[loss], real_targets=real_targets, example_weights=lambda batch: jnp.asarray(weights)
    )

    layers = curvax.find_layers(objective, params, batch, fallback="diagonal")

    @jax.jit
    def compute(params, batch):
        value, gradient, at = objective.value_and_grad(params, batch)
        G, H, F = curvax.ggn(at), curvax.hessian(at), curvax.empirical_fisher(at)
        tapped = curvax.tap(layers, at)
        vector = jax.tree.map(jnp.ones_like, params)
        return (
            (value, objective(params, batch), G.quadratic(vector), H.quadratic(vector)),
            gradient,
            (G.to_dense(), H.to_dense(), F.to_dense()),
            curvax.layers.exact_ggn_diagonal(tapped),
            curvax.layers.gradient_norms(tapped),
            curvax.gram(tapped),
        )

    numbers, gradient, (G, H, F), diagonal, norms, gram = compute(params, batch)
    truth, slope, ggn, hessian, each = dense(model, params, batch, weights / N)
    near = {"rtol": 0, "atol": rounding(jnp.float64, 1000, scale=np.abs(hessian).max() + np.abs(ggn).max())}
    assert {x.dtype for x in numbers} == {jnp.dtype("float64")}
    np.testing.assert_allclose(numbers, [truth, truth, ggn.sum(), hessian.sum()], rtol=1e-10)
    np.testing.assert_allclose(flat(gradient), slope, **near)
    np.testing.assert_allclose(G, ggn, **near)
    np.testing.assert_allclose(H, hessian, **near)
    np.testing.assert_allclose(F, (each.T * weights / N) @ each, rtol=0, atol=1e-12 * np.sum(each**2))
    np.testing.assert_allclose(flat(diagonal), np.diag(ggn), **near)
    own = np.concatenate([np.full(leaf.size, i in layers.structured) for i, leaf in enumerate(jax.tree.leaves(params))])
    np.testing.assert_allclose(norms, np.linalg.norm(each[:, own], axis=1), rtol=1e-10)
    spectrum = np.sort(np.linalg.eigvalsh(ggn[np.ix_(own, own)]))[::-1][: len(gram)]
    ours = np.sort(np.linalg.eigvalsh(gram))[::-1][: len(spectrum)]
    np.testing.assert_allclose(ours, spectrum, **near)


@pytest.mark.parametrize("loss", ["squared_error", "from_function"])
def test_draws_and_steps(loss):
    """The Fisher matrix of z + noise, its Monte-Carlo estimate, noise of covariance G, and a step by the samples."""
    inner = LOSSES[loss]
    if loss == "from_function":

        def sample(key, z):
            return z + jax.lax.complex(*jax.random.normal(key, (2, *z.shape)))

        inner = losses.from_function(half_square, convex=True, natural=True, sample=sample)
    objective, params, batch = setting(amplitude, inner)
    _, slope, ggn, _, _ = dense(amplitude, params, batch, np.full(N, 1 / N))
    tx = curvax.scale_by_sample_space(damping=0.1)

    @jax.jit
    def compute(params, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        G, keys = curvax.ggn(at), jax.random.split(jax.random.key(0), 4000)
        draws = jax.vmap(lambda key: curvax.trees.ravel(G.sample(key)))(keys)
        sampled = curvax.fisher(at, key=keys[0], num_samples=2000).to_dense()
        updates, _ = tx.update(gradient, tx.init(params), params, at=at)
        return curvax.fisher(at).to_dense(), sampled, draws, updates

    exact, sampled, draws, updates = compute(params, batch)
    np.testing.assert_allclose(exact, ggn, rtol=0, atol=1e-12)
    for estimate in (sampled, draws.T @ draws / len(draws)):
        assert np.linalg.norm(estimate - ggn) < 0.1 * np.linalg.norm(ggn)
    np.testing.assert_allclose(flat(updates), np.linalg.solve(ggn + 0.1 * np.eye(len(ggn)), slope), rtol=1e-8)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_curvature_only_of_narrow_and_nested_outputs(chunk_size):
    """A real head next to a complex one, in single precision, and no targets."""

    def model(params, x):
        return {"amplitude": amplitude(params, x), "scale": x @ params["w"]}

    def function(z, y):
        del y
        return jnp.abs(z["amplitude"]) ** 2 / 2 + jnp.sum(z["scale"] ** 2)

    loss = losses.curvature_only(losses.from_function(function, convex=True))
    generator = np.random.default_rng(0)
    shapes = {"w": (3, 4), "modulus": (4,), "phase": (4,)}
    params = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(generator.normal(size=(N, 3)), jnp.float32)
    objective = curvax.Objective(model, loss)

    @jax.jit
    def compute(params, x):
        return curvax.ggn(objective.linearize(params, (x, None), chunk_size=chunk_size)).to_dense()

    G = compute(params, x)
    assert G.dtype == jnp.float32
    truth = np.array(dense(amplitude, params, (x, np.zeros(N)), np.full(N, 1 / N))[2])
    truth[8:, 8:] += np.kron(np.float64(x).T @ np.float64(x) * 2 / N, np.eye(4))
    np.testing.assert_allclose(G, truth, rtol=0, atol=rounding(jnp.float32, 100, scale=np.abs(truth).max()))


def test_outputs_and_jacobian_products_are_complex_to_the_user():
    objective, params, batch = setting(amplitude, losses.squared_error())
    jacobian = jax.jacfwd(amplitude)(params, batch[0])
    rows = np.concatenate([np.asarray(leaf).reshape(N, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)

    @jax.jit
    def compute(params, batch):
        at = objective.linearize(params, batch)
        vector = jax.tree.map(jnp.ones_like, params)
        return at.outputs, at.jacobian_product(vector), at.jacobian_transpose_product(batch[1])

    outputs, forward, backward = compute(params, batch)
    np.testing.assert_allclose(outputs, amplitude(params, batch[0]), rtol=1e-12)
    np.testing.assert_allclose(forward, rows.sum(1), rtol=1e-12)
    np.testing.assert_allclose(flat(backward), (rows.conj().T @ np.asarray(batch[1])).real, rtol=1e-10)


def classes(params, x):
    return jnp.argmax(x @ params["w"], axis=1)


@pytest.mark.parametrize(
    ("model", "loss", "error", "message"),
    [
        (amplitude, losses.sigmoid_binary_cross_entropy(), TypeError, r"outputs have dtype complex128, which Sigmoid"),
        (spectrum, losses.softmax_cross_entropy(), TypeError, r"complex128, which Softmax.*real and imaginary part"),
        (amplitude, losses.poisson(), TypeError, r"complex128, which Poisson"),
        (lambda p, x: (amplitude(p, x),) * 2, losses.gaussian(), TypeError, r"outputs\['0'\] have dtype complex128"),
        (amplitude, losses.curvature_only(losses.poisson()), TypeError, r"complex128, which CurvatureOnly"),
        (amplitude, losses.from_function(lambda z, y: z * y, convex=True), TypeError, "real floating-point number"),
        (classes, losses.squared_error(), TypeError, r"outputs have dtype int.*change with the parameters"),
    ],
)
def test_what_takes_no_complex_outputs_says_so(model, loss, error, message):
    _, params, batch = setting(amplitude, losses.squared_error())
    objective = curvax.Objective(model, loss)
    for call in (objective, objective.linearize):
        with pytest.raises(error, match=message):
            call(params, batch)


def test_a_real_vector_pulls_back_through_complex_outputs_and_a_complex_one_not_through_real_ones():
    x, w = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (3, 2))
    loss = curvax.losses.squared_error()

    def model(w, x):
        z = jnp.tanh(x @ w)
        return jax.lax.complex(z[:, 0], z[:, 1])

    at = curvax.Objective(model, loss).linearize(w, (x, jnp.zeros(4)))
    real = jnp.arange(4.0)
    np.testing.assert_allclose(
        at.jacobian_transpose_product(real), at.jacobian_transpose_product(real + 0j), rtol=1e-12
    )
    other = curvax.Objective(lambda w, x: x @ w, loss).linearize(w, (x, jnp.zeros((4, 2))))
    with pytest.raises(TypeError, match="where a real one belongs"):
        other.jacobian_transpose_product(jnp.ones((4, 2), complex))
