"""The steps of `profile` with --swap and without, in turns: what does one expert more for each token cost, and what the
changes that follow from it?

    python -m experiments.bench.swap [--model MODEL] [--pairs 5]

MODEL is a checkpoint of two layers of gpt-oss-20b's shape (`python -m experiments.checkpoints MODEL --preset 20b
--layers 2`), which run as the streamed engine runs them; nano runs as the resident one does. Every token counts, which
is the dearest case: tokens that do not count take no expert more. Both steps run in one process right after each other,
so that a ratio is of the same machine; processor time is of both, and minds other programs less.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import jax
import numpy as np
from flax import nnx

from convert.sources import NANO, open_source
from gptoss_jax.data.batching import Document, padded
from gptoss_jax.devices.placement import here
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.model import Layer
from gptoss_jax.network.source import Source, load, load_part
from gptoss_jax.run.steps import Asked, layer_step, network_step
from gptoss_jax.run.streamed import weights_form

Run = Callable[[], Any]
ASKED = Asked(), Asked(swap=True)


def batch(source: Source, rows: int, length: int) -> Batch:
    """Random tokens, all of which count."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, source.config.vocab_size, (rows, length)).astype(np.int32)
    (made,) = padded([Document(row, np.ones(length, np.float32)) for row in ids], rows, length)
    return made


def resident(source: Source, rows: Batch) -> list[Run]:
    """The step of all layers, without and with."""
    network = load(source, "bfloat16")
    jitted = [jax.jit(partial(network_step, place=here(), asked=asked)) for asked in ASKED]
    return [partial(step.lower(network, rows).compile(), network, rows) for step in jitted]


def streamed(source: Source, rows: Batch) -> list[Run]:
    """The first layer's, and then the second's of what the first gives."""
    config, form = source.config, weights_form(source)
    x_BSD = jax.numpy.asarray(source.rows("embedding", rows.tokens.ids).astype("bfloat16", copy=False))
    layers = [
        load_part(source, lambda: Layer(config, form, rngs=nnx.Rngs(0)), "bfloat16", f"layers/{index}/")
        for index in range(config.num_layers)
    ]
    indices = [np.asarray(number) for number in range(config.num_layers)]

    def run(step: Any) -> Any:
        hidden, results = x_BSD, []
        for layer, index in zip(layers, indices, strict=True):
            hidden, result = step(layer, hidden, rows, index)
            results.append(result)
        return results

    jitted = [jax.jit(partial(layer_step, config=config, place=here(), asked=asked)) for asked in ASKED]
    return [partial(run, step.lower(layers[0], x_BSD, rows, indices[0]).compile()) for step in jitted]


def took(run: Run) -> tuple[float, float]:
    """Seconds, and those of the processors."""
    start = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - start[0], time.process_time() - start[1]


@click.command()
@click.option("--model", help="Two layers of 20b's shape; without it nano alone is run.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=32, show_default=True, help="Rows of 256 tokens of MODEL.")
def main(model: str | None, pairs: int, rows: int) -> None:
    """Print a row for each model: with --swap over without, median and range."""
    cases = {"nano, resident, 32 × 256 tokens": (NANO, 32, resident)}
    if model:
        cases[f"two layers of 20b, streamed, {rows} × 256 tokens"] = (model, rows, streamed)
    click.echo("| step | without, s | with, s | with / without | processor time, with / without |")
    click.echo("|---|---:|---:|---|---|")
    for name, (path, count, make) in cases.items():
        source = open_source(path)
        both = make(source, batch(source, count, 256))
        times: list[list[tuple[float, float]]] = [[], []]
        for pair in range(pairs + 1):
            for way in (0, 1) if pair % 2 else (1, 0):
                times[way].append(took(both[way]))
        without, with_ = (way[1:] for way in times)  # the first warms up
        shown = [[b[i] / a[i] for a, b in zip(without, with_, strict=True)] for i in range(2)]
        ratios = [f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in shown]
        middle = [statistics.median(seconds for seconds, _ in way) for way in (without, with_)]
        click.echo(f"| {name} | {middle[0]:.2f} | {middle[1]:.2f} | {ratios[0]} | {ratios[1]} |")


if __name__ == "__main__":
    main()
