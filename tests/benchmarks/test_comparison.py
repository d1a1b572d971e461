"""Networks beyond autoencoders: K-FAC sees every matrix of them, and a comparison leaves what it promises."""

import json

import jax
import numpy as np
import optax
import pytest

import curvax
from benchmarks import char_transformer, comparison, data, image_kfac
from benchmarks.image_networks import mlp


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.many_compilations("flax initialises the transformer eagerly")
def test_every_matrix_of_the_transformer_has_factors():
    _, _, params, layers = char_transformer.problem(width=8)
    matrices = {"down/kernel", "mix/kernel", "read/kernel", "up/kernel"}
    expected = {f"blocks/{name}" for name in matrices} | {"embed/embedding", "place/embedding"}
    assert {block.name for block in layers.treatment.kronecker} == expected
    assert layers["embed/embedding"].members[1].swapped  # the output layer is the embedding
    assert not layers.unstructured
    assert len(layers.paths) == len(jax.tree.leaves(params))


@pytest.mark.parametrize(("name", "count"), [("small_cnn", 5), ("resnet20", 22)])
def test_every_kernel_of_the_image_networks_has_factors(name, count):
    _, _, params, layers = image_kfac.problem(name, num_train=4, num_test=4)
    kernels = [path for path in layers.paths if path.endswith("kernel")]
    assert [block.name for block in layers.treatment.kronecker] == kernels
    assert len(kernels) == count
    assert layers.couples_examples == (name == "resnet20")
    assert len(jax.tree.leaves(params)) == len(layers.paths)


@pytest.mark.many_compilations("the benchmark writes figures eagerly")
def test_a_comparison_leaves_records_and_a_plot(tmp_path, capsys):
    digits = data.load("digits", num_train=60, num_test=20)
    network = mlp((64, 8, 10))
    objective = curvax.Objective(network.apply, curvax.losses.softmax_cross_entropy())
    params = jax.jit(network.init)(jax.random.key(0))
    assert len(comparison.layers_of(objective, params, digits)) == 4
    command = f"--seconds 0.05 --batch-size 20 --rates 0.01 --output {tmp_path}"
    arguments = comparison.parser("", "", 1).parse_args(command.split())
    runs = comparison.compare(objective, params, digits, {"sgd": optax.sgd(0.1)}, arguments)
    assert list(runs) == ["sgd", "sgd, averaged", "adam 0.01, cosine decay"]
    for records in runs.values():
        assert records[-1]["seen"] == 20 * records[-1]["step"]
        assert records[-1]["loss"] < records[0]["loss"]
    batch = digits.train_inputs, digits.train_targets
    np.testing.assert_allclose(runs["sgd"][0]["loss"], objective(params, batch), rtol=1e-5)
    assert "adam 0.01" in capsys.readouterr().out
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert len([json.loads(file.read_text()) for file in tmp_path.glob("*.json")]) == 3
