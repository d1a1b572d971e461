"""A character transformer by K-FAC, and by Adam at several rates with cosine decay, for as many seconds each.

Run: ``python -m benchmarks.char_transformer``. flax nnx, one scan over the blocks, the embedding tied to the output
layer; K-FAC finds every matrix by itself. Loss in nats per character against characters seen and seconds.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import curvax
from benchmarks import data
from benchmarks.comparison import compare, layers_of, parser

LENGTH = 64


class Block(nnx.Module):
    """Attention and a dense layer, each behind a norm."""

    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.read, self.mix = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        heads = self.read(self.norms[0](x)).reshape(*x.shape[:2], 3 * self.heads, -1)
        mixed = jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=2), is_causal=True)
        x = x + self.mix(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Characters so far -> logits of the next, at every place."""

    def __init__(self, characters, length, rngs, width=64, heads=4, depth=3):
        self.embed, self.place = nnx.Embed(characters, width, rngs=rngs), nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=depth)(nnx.vmap(lambda rngs: Block(width, heads, rngs)))(rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, codes):
        places = jnp.arange(codes.shape[1]) + 0 * codes  # looked up for every row, so that it is a layer with factors
        x = self.embed(codes) + self.place(places)
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.embed.attend(self.norm(x))


def problem(width=64):
    """The text, the objective, the parameters and their layers."""
    text = data.load("shakespeare", sequence_length=LENGTH)
    graph, params = nnx.split(Transformer(len(text.vocabulary), LENGTH, nnx.Rngs(0), width), nnx.Param)
    objective = curvax.Objective(lambda params, x: nnx.merge(graph, params)(x), curvax.losses.softmax_cross_entropy())
    return text, objective, params, layers_of(objective, params, text)


def main(argv=None):
    arguments = parser(__doc__, "char_transformer", batch_size=64).parse_args(argv)
    text, objective, params, layers = problem()
    print(layers)
    compare(objective, params, text, {"kfac": curvax.kfac(layers, initial_damping=arguments.damping)}, arguments)


if __name__ == "__main__":
    main()
