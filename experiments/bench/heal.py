"""A step of streamed distillation at 20b's shape: what forward, head and backward take beside one large product.

    python -m experiments.checkpoints MODEL --preset 20b --layers 2
    python -m experiments.bench.heal MODEL

MODEL may have fewer layers than gpt-oss-20b: the times of layers are then projected to all of them, and the table says
so. Each token counts, and the student keeps half of the experts. Shares are of the rate of one product in bfloat16 of
2,048 rows with an expert's gate and up, which runs before each step, so that both see the same machine.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np

from convert.sources import open_source
from gptoss_jax.config import GPT_OSS_20B, Config
from gptoss_jax.data.batching import Document, padded
from gptoss_jax.evaluation.compare import Top
from gptoss_jax.healing import trained
from gptoss_jax.healing.loss import Finals
from gptoss_jax.healing.streamed import Streamed
from gptoss_jax.network.batch import Batch

GIB = 1 << 30
PRODUCT_ROWS = 2048
STEPS = 60  # of a run


class Part(NamedTuple):
    """A part of a step."""

    seconds: float
    flops: float
    layers: bool
    """Whether it grows with the layers."""


def batches(config: Config, rows: int, length: int, at_once: int) -> list[Batch]:
    """Random tokens, all of which count, and a random half of the experts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    documents = [Document(row, np.ones(length, np.float32)) for row in ids]
    order = rng.permuted(np.tile(np.arange(config.num_experts), (config.num_layers, 1)), axis=1)
    kept = np.tile(order < config.num_experts // 2, (at_once, 1, 1))
    return [replace(batch, kept=kept) for batch in padded(documents, at_once, length)]


def flops(config: Config, tokens: int, whole_teacher: bool) -> dict[str, float]:
    """Of the products of a step by its parts, scores of attention left out; a backward pass has those of the layer that
    runs again, and makes no gradient by a kernel."""
    D, heads = config.hidden_size, (config.num_heads + config.num_kv_heads) * config.head_dim
    attention = 4.0 * tokens * D * heads
    experts = 6.0 * tokens * config.top_k * D * config.expert_hidden_size
    head = 2.0 * tokens * D * config.vocab_size * (3 if whole_teacher else 2)
    forward, backward = attention + experts, 2 * attention + experts * 5 / 3
    return {"forward": config.num_layers * forward, "head": head, "backward": config.num_layers * backward}


def product_rate() -> float:
    """FLOP/s of one large product, the median of three."""
    D, O = GPT_OSS_20B.hidden_size, 2 * GPT_OSS_20B.expert_hidden_size
    x, w = jnp.ones((PRODUCT_ROWS, D), jnp.bfloat16), jnp.ones((O, D), jnp.bfloat16)
    product = jax.jit(lambda x, w: jnp.einsum("MD,OD->MO", x, w, preferred_element_type=jnp.float32))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(product(x, w))
        seconds.append(time.perf_counter() - start)
    return 2.0 * PRODUCT_ROWS * D * O / float(np.median(seconds[1:]))


def step(
    engine: Streamed, given: trained.Trained, rows: Sequence[Batch], teachers: Sequence[Finals | Top]
) -> tuple[dict[str, Part], float]:
    """The parts of one step, and the seconds of all of it."""
    clocks = {"forward": engine.forward, "head": engine.head, "backward": engine.backward}
    before = {name: clock.seconds for name, clock in clocks.items()}
    compiling = sum(clock.compile_seconds for clock in clocks.values())
    start = time.perf_counter()
    found = engine.gradients(given, rows, teachers)
    jax.block_until_ready(found.gradients)
    whole = time.perf_counter() - start - sum(clock.compile_seconds for clock in clocks.values()) + compiling
    tokens = sum(batch.tokens.count for batch in rows)
    work = flops(engine.config, tokens, engine.kind is Finals)
    return {name: Part(c.seconds - before[name], work[name], name != "head") for name, c in clocks.items()}, whole


def peak_gib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True)
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a row.")
@click.option("--at-once", type=click.IntRange(1), help="Rows of a batch.  [default: all]")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Steps, behind one that warms up.")
@click.option("--top", is_flag=True, help="The teacher keeps its most probable tokens alone.")
@click.option("--kind", type=click.Choice(list(trained.KINDS)), default="router", show_default=True)
def main(model: str, rows: int, length: int, at_once: int | None, rounds: int, top: bool, kind: trained.Kind) -> None:
    """Print the table."""
    source = open_source(model)
    config, layers = source.config, GPT_OSS_20B.num_layers
    engine = Streamed(source, "bfloat16", Top if top else Finals)
    given, made = trained.read(source, kind), batches(config, rows, length, at_once or rows)
    teachers = engine.teach(made)
    click.echo(f"{rows} × {length} tokens, {config.num_layers} layers; teacher made: {peak_gib():.2f} GiB at peak")
    click.echo("| part | s | GFLOP/s | of one product | s, 24 layers |\n|---|---:|---:|---:|---:|")
    for round_ in range(rounds + 1):
        rate = product_rate()
        parts, whole = step(engine, given, made, teachers)
        if not round_:
            continue
        all_layers = {name: p.seconds * (layers / config.num_layers if p.layers else 1) for name, p in parts.items()}
        for name, part in parts.items():
            speed = part.flops / part.seconds
            click.echo(
                f"| {name} | {part.seconds:.1f} | {speed / 1e9:.0f} | {speed / rate:.0%} | {all_layers[name]:.0f} |"
            )
        total, done = sum(all_layers.values()), sum(part.seconds for part in parts.values())
        share = sum(part.flops for part in parts.values()) / done / rate
        click.echo(f"| the step, with reading | {whole:.1f} | | {share:.0%} | {total:.0f} |")
    click.echo(
        f"{peak_gib():.2f} GiB at peak; one product {rate / 1e9:.0f} GFLOP/s; {STEPS} steps of {layers} layers, "
        f"{'measured' if layers == config.num_layers else 'projected from ' + str(config.num_layers)}: "
        f"{STEPS * total / 60:.0f} minutes without reading"
    )


if __name__ == "__main__":
    main()
