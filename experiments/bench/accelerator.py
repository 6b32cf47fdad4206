"""The profile step at 20b's shape on the devices at hand, beside one large product and the seed's figures.

    python -m experiments.bench.accelerator
    python -m experiments.bench.accelerator --layers 1 --batches 1 --lengths 256 --side 1024    # a trial on CPU

Weights are random and made on the devices. A figure is the median of the rounds, in each of which the product
and the step take turns, so that both see the same machine.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptoss_jax.config import GPT_OSS_20B, Config
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.network.batch import Batch, Tokens
from gptoss_jax.network.model import GptOss
from gptoss_jax.network.source import abstract
from gptoss_jax.pods.plan import Case, active_matmul_flops
from gptoss_jax.run.steps import Asked, mapped

SEED = {"saliency": 1551, "usage": 4498}  # tokens/s of the hook scripts on one data-centre GPU
SCALE_BYTE = 120  # of MXFP4: 2^-7, with which random codes spread as real weights do


def random_model(config: Config, mesh: Mesh, weights: str) -> GptOss:
    """All layers have the same experts, which no product minds, and routers of their own."""

    def values(path: str, wanted: Any, key: jax.Array) -> jax.Array:
        if wanted.dtype == jnp.uint8:
            one = jnp.full(wanted.shape[1:], SCALE_BYTE, jnp.uint8) if "scales" in path else None
            one = jax.random.bits(key, wanted.shape[1:], jnp.uint8) if one is None else one
            return jnp.broadcast_to(one, wanted.shape)
        repeated = "experts" in path
        shape = wanted.shape[1:] if repeated else wanted.shape
        # Logits of normed inputs spread by 2: experts are chosen by what a token is.
        spread = 2 / math.sqrt(config.hidden_size) if "router/kernel" in path else 0.02
        noise = spread * jax.random.normal(key, shape, wanted.dtype) + ("norm" in path)
        return jnp.broadcast_to(noise, wanted.shape)

    shapes = abstract(config, mesh, jnp.bfloat16, weights)
    leaves = sharding.by_path(shapes)
    made = []
    for key, (name, wanted) in zip(jax.random.split(jax.random.key(0), len(leaves)), leaves.items(), strict=True):
        make = jax.jit(lambda key, name=name, wanted=wanted: values(name, wanted, key), out_shardings=wanted.sharding)
        made.append(make(key))
    return jax.tree.unflatten(jax.tree.structure(shapes), made)


def random_batch(config: Config, batch: int, length: int, mesh: Mesh) -> Batch:
    """Rows full of tokens, all of which count."""
    shape = (batch, length)
    tokens = np.random.default_rng(length).integers(0, config.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    rows = Batch(
        Tokens(tokens, positions, np.ones(shape, np.int32)), np.ones(shape, np.float32), np.zeros(shape, np.int32)
    )
    return jax.device_put(rows, sharding.rows(mesh))


def product(side: int) -> tuple[Callable[[], Any], float]:
    """One large product in bfloat16 on one device, and its floating-point operations."""
    x = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    multiply = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x, preferred_element_type=jnp.float32).astype(x.dtype))
    return lambda: multiply(x), 2.0 * side**3


def in_turns(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of each; a first round warms up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for run, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_:
                taken.append(time.perf_counter() - start)
    return float(np.median(seconds[0])), float(np.median(seconds[1]))


@click.command()
@click.option("--layers", type=int, default=GPT_OSS_20B.num_layers, show_default=True)
@click.option("--batches", default="4,16,32", show_default=True, help="Rows a step, at length 2048.")
@click.option("--lengths", default="512,2048,8192", show_default=True, help="Tokens a row, at 32,768 tokens a step.")
@click.option("--weights", type=click.Choice(["bf16", "mxfp4"]), default="bf16", show_default=True)
@click.option("--expert", type=int, help="Devices that experts are split over.  [default: as profile chooses]")
@click.option("--side", default=8192, show_default=True, help="Of the large product's matrices.")
@click.option("--rounds", default=5, show_default=True)
def main(layers: int, batches: str, lengths: str, weights: str, expert: int | None, side: int, rounds: int) -> None:
    """Print the table."""
    config = replace(GPT_OSS_20B, num_layers=layers, layer_types=GPT_OSS_20B.layer_types[:layers])
    expert = expert or sharding.default_sizes(config, jax.device_count())[1]
    data = jax.device_count() // expert
    mesh = sharding.make(config, data, expert)
    model = random_model(config, mesh, weights)
    multiply, multiply_flops = product(side)
    shapes = [(int(b), 2048) for b in batches.split(",")]
    shapes += [(max(data, 32768 // int(n)), int(n)) for n in lengths.split(",")]
    click.echo(
        f"{jax.device_count()} × {jax.devices()[0].device_kind}, data={data} × expert={expert}, {weights} experts"
    )
    click.echo("| rows | tokens/s | of the product's rate | product, TFLOP/s | × saliency seed | × usage seed |")
    click.echo("|---|---:|---:|---:|---:|---:|")
    for batch, length in dict.fromkeys(shapes):
        rows = random_batch(config, batch, length, mesh)
        step = mapped(Asked(), mesh).step.lower(model, rows).compile()
        seconds, multiply_seconds = in_turns(lambda s=step, r=rows: s(model, r), multiply, rounds)
        flops = active_matmul_flops(Case(config, "", data, expert, weights, batch, length))
        peak = multiply_flops / multiply_seconds
        rate = batch * length / seconds
        share = flops / seconds / (peak * data * expert)
        times = " | ".join(f"{rate / seed:.1f}" for seed in SEED.values())
        click.echo(f"| {batch} × {length:,} | {rate:,.0f} | {share:.1%} | {peak / 1e12:.3g} | {times} |")


if __name__ == "__main__":
    main()
