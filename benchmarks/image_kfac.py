"""ResNet-20 or a small convolutional network on CIFAR-10 by K-FAC, and by Adam at several rates with cosine decay.

Run: ``python -m benchmarks.image_kfac --network resnet20``. Where a network normalises its batches, gradients of single
examples are those of the sum of all losses, cut up by example, and so are K-FAC's statistics.
"""

from __future__ import annotations

import jax

import curvax
from benchmarks import data
from benchmarks import image_networks as networks
from benchmarks.comparison import compare, layers_of, parser

NETWORKS = {"small_cnn": networks.small_cnn, "basic_cnn": networks.basic_cnn, "resnet20": networks.resnet20}


def problem(name, num_train=None, num_test=None):
    """The images, the objective, the parameters and their layers."""
    images, network = data.load("cifar10", num_train=num_train, num_test=num_test), NETWORKS[name]()

    def apply(params, rows):
        return network.apply(params, rows.reshape(-1, *network.image_shape))

    objective = curvax.Objective(apply, curvax.losses.softmax_cross_entropy())
    params = jax.jit(network.init)(jax.random.key(0))
    return images, objective, params, layers_of(objective, params, images)


def main(argv=None):
    """Trains one of the networks with every method."""
    command = parser(__doc__, "image_kfac", batch_size=128)
    command.add_argument("--network", choices=list(NETWORKS), default="small_cnn")
    arguments = command.parse_args(argv)
    arguments.output = arguments.output / arguments.network
    images, objective, params, layers = problem(arguments.network)
    print(layers)
    compare(objective, params, images, {"kfac": curvax.kfac(layers, initial_damping=arguments.damping)}, arguments)


if __name__ == "__main__":
    main()
