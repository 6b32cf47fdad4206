"""Elimination at 20b's shape, streamed: what all experts of a layer take beside one large product, and what choosing
takes.

    python -m experiments.checkpoints MODEL --preset 20b --layers 2
    python -m experiments.bench.greedy MODEL

MODEL may have fewer layers than gpt-oss-20b: times are then projected to all of them, and the table says so. Every
token counts and takes all experts. Shares are of the rate of one product in bfloat16, measured right before.
"""

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from convert.sources import open_source
from gptoss_jax.config import GPT_OSS_20B, Config
from gptoss_jax.data.batching import Document, padded
from gptoss_jax.run.progress import Progress
from gptoss_jax.run.streamed import Streamed
from gptoss_jax.search.elimination import ASKED
from gptoss_jax.selection.greedy import Grams, eliminate

from .heal import peak_gib, product_rate


def flops(config: Config, tokens: int) -> float:
    """Of the products of one layer: attention, the experts that are chosen, all experts, and those of outputs."""
    D, F, E = config.hidden_size, config.expert_hidden_size, config.num_experts
    attention = 4.0 * D * (config.num_heads + config.num_kv_heads) * config.head_dim
    return tokens * (attention + 6.0 * D * F * (config.top_k + E) + 2.0 * D * E * E)


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--rows", type=click.IntRange(1), default=32, show_default=True)
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a row.")
@click.option("--at-once", type=click.IntRange(1), default=8, show_default=True, help="Rows of a batch.")
def main(model: str, rows: int, length: int, at_once: int) -> None:
    """Print the table."""
    source = open_source(model)
    config, rng = source.config, np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    batches = list(padded([Document(row, np.ones(length, np.float32)) for row in ids], at_once, length))
    rate, tokens = product_rate(), rows * length
    with tempfile.TemporaryDirectory() as folder:
        engine = Streamed(source, "bfloat16", Progress(Path(folder) / "keep.json"), 1 << 30)
        first = [unit.grams for unit in engine.run(batches, ASKED, 0) if unit.first_layer == 0]
    grams = Grams(*(np.concatenate([x.reshape(-1, *x.shape[3:]) for x in of]) for of in zip(*first, strict=True)))  # type: ignore[arg-type]
    eliminate(grams, config.top_k, config.num_experts - 1)  # compiles
    start = time.perf_counter()
    eliminate(grams, config.top_k)
    choosing = time.perf_counter() - start
    layers, steps = GPT_OSS_20B.num_layers, engine.clock.seconds / config.num_layers
    share = flops(config, tokens) / steps / rate
    whole = layers * (steps + choosing)
    click.echo(f"{tokens:,} tokens, {config.num_layers} of {layers} layers; one product {rate / 1e9:.0f} GFLOP/s")
    click.echo("| a layer, s | of one product | choosing in a layer, s | all layers, s | tokens/s | GiB at peak |")
    click.echo("|---:|---:|---:|---:|---:|---:|")
    click.echo(
        f"| {steps:.1f} | {share:.0%} | {choosing:.1f} | {whole:.0f} | {tokens / whole:.1f} | {peak_gib():.2f} |"
    )


if __name__ == "__main__":
    main()
