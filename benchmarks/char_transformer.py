"""A character transformer by K-FAC, and by Adam at several rates with cosine decay, for as many seconds each.

Run: ``python -m benchmarks.char_transformer``. flax nnx, one scan over the blocks, the embedding tied to the output
layer; K-FAC finds every matrix by itself. Loss in nats per character against characters seen and seconds.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import curvax
from benchmarks import data, plots
from benchmarks.machine import on_machine
from benchmarks.progress import log_json, table
from benchmarks.training import Batches, train


class Block(nnx.Module):
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
    def __init__(self, characters, length, rngs, width=64, heads=4, depth=3):
        self.embed, self.place = nnx.Embed(characters, width, rngs=rngs), nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=depth)(nnx.vmap(lambda rngs: Block(width, heads, rngs)))(rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, codes):
        x = self.embed(codes) + self.place(jnp.arange(codes.shape[1]))
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.embed.attend(self.norm(x))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="training time of each run (default 120)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="characters of a row (default 64)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates of Adam")
    parser.add_argument("--damping", type=float, default=150.0, help="of K-FAC, at the start")
    parser.add_argument("--output", type=Path, default=Path("char_transformer"))
    arguments = parser.parse_args(argv)
    text = data.load("shakespeare", sequence_length=arguments.length)
    graph, params = nnx.split(Transformer(len(text.vocabulary), arguments.length, nnx.Rngs(0)), nnx.Param)
    objective = curvax.Objective(lambda params, x: nnx.merge(graph, params)(x), curvax.losses.softmax_cross_entropy())
    layers = curvax.find_layers(objective, params, (text.train_inputs[:2], text.train_targets[:2]))
    print(f"{text}\n{curvax.trees.size(params)} parameters; on {on_machine()}\n{layers}")
    loss = jax.jit(lambda params, batch: objective(params, batch) / arguments.length)

    def evaluate(params):
        return {
            "loss": float(loss(params, (text.train_inputs[:500], text.train_targets[:500]))),
            "test_loss": float(loss(params, (text.test_inputs[:500], text.test_targets[:500]))),
        }

    runs, rows, (seconds, size) = {}, [], (arguments.seconds, arguments.batch_size)
    optimizers = {f"adam {rate:g}, cosine decay": optax.adam(rate) for rate in arguments.rates}
    for name, tx in {"kfac": curvax.kfac(layers, initial_damping=arguments.damping), **optimizers}.items():
        batches = Batches(text.train_inputs, text.train_targets, size)
        folder = (arguments.output / f"{name}, {size}x{arguments.length}, {seconds:g} s").absolute()
        options = {"seconds": seconds, "cosine_decay": name != "kfac", "checkpoints": folder}
        runs[name] = train(name, tx, objective, params, batches, evaluate=evaluate, **options).records
        for record in runs[name]:
            record["characters"] = record["step"] * size * arguments.length
            log_json(arguments.output / "log.jsonl", {"optimizer": name, **record})
        rows.append({"optimizer": name, **runs[name][-1]})
    table(rows, ["optimizer", "step", "characters", "seconds", "loss", "test_loss"], "nats per character")
    plots.plot_runs(runs, arguments.output / "loss.png", title=str(text), label="nats per character")


if __name__ == "__main__":
    main()
