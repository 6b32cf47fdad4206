"""What loading takes of a host's memory: a checkpoint onto a mesh of simulated devices of one process.

    python -m experiments.checkpoints MODEL --preset 20b --layers 8
    python -m experiments.bench.loading MODEL --weights mxfp4

On a TPU what devices hold is in their own memory; here it is the host's, so the peak is all parts and what was
needed beside them.
"""

import os
import time

import click

from gptoss_jax.network.source import load

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from convert.sources import open_source
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.run.artifacts import peak_rss_bytes


@click.command()
@click.argument("model")
@click.option("--weights", type=click.Choice(["bf16", "mxfp4"]), default="bf16", show_default=True)
def main(model: str, weights: str) -> None:
    """Print one line of the table."""
    source = open_source(model)
    mesh = sharding.make(source.config, 1, jax.device_count())
    jax.block_until_ready(jax.numpy.zeros(1))
    before, start = peak_rss_bytes(), time.perf_counter()
    loaded = jax.block_until_ready(load(source, "bfloat16", mesh, weights))
    seconds = time.perf_counter() - start
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(loaded) for shard in leaf.addressable_shards)
    part = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded))
    beside = peak_rss_bytes() - before - held
    gib = 1 << 30
    click.echo("| weights | held by 8 devices, GiB | largest part | peak beside what is held | seconds |")
    click.echo("|---|---:|---:|---:|---:|")
    click.echo(f"| {weights} | {held / gib:.2f} | {part / gib:.2f} | {beside / gib:.2f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
