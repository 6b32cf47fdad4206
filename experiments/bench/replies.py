"""Replies of a model larger than memory: seconds of a step, in which every layer is read once for all rows.

    python -m experiments.checkpoints MODEL --preset 20b
    python -m experiments.bench.replies MODEL [--rows 32] [--prompt 64] [--steps 5] [--memory-gib 6]

The first step takes the prompts in, and the others say a token for each row. Rows are traced or not, in turns. Memory
is the most that the process took.
"""

import resource
import time
from statistics import median

import click
import numpy as np

from convert.sources import open_source
from gptoss_jax.generation import choose
from gptoss_jax.generation.continuous import generate, prompts_of
from gptoss_jax.generation.steps import How
from gptoss_jax.run.options import Placing, Sampling


def seconds_of_steps(model: str, rows: int, length: int, steps: int, memory_gib: float, traced: bool) -> list[float]:
    """Those of the step that takes prompts in, and of those behind it."""
    source = open_source(model)
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (rows, length)).astype(np.int32)
    asked = prompts_of(list(ids), source.config, steps)
    placing = Placing(engine="streamed", memory_gib=memory_gib, batch_size=rows)
    decoder = choose.decoder(source, placing, asked, How(source.config, Sampling(temperature=0.0), (), routing=traced))
    took, replies = [], generate(decoder, asked)
    for _ in range(steps):  # one more runs no row: the last tokens do not pass the network
        start = time.perf_counter()
        next(replies)
        took.append(time.perf_counter() - start)
    return took


@click.command()
@click.argument("model")
@click.option("--rows", type=click.IntRange(1), default=32, show_default=True)
@click.option("--prompt", "length", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a prompt.")
@click.option("--steps", type=click.IntRange(2), default=5, show_default=True)
@click.option("--memory-gib", type=float, default=6.0, show_default=True)
def main(model: str, rows: int, length: int, steps: int, memory_gib: float) -> None:
    """Print a line for each way."""
    for traced in (False, True):
        first, _, *others = seconds_of_steps(model, rows, length, steps, memory_gib, traced)  # the second compiles
        each, peak = median(others), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        click.echo(
            f"{'traced' if traced else 'not traced'}: {first:.1f} s to take in {rows} prompts of {length} tokens, "
            f"{each:.1f} s a step ({min(others):.1f} to {max(others):.1f}), {rows / each:.2f} tokens/s; {peak:.2f} GiB"
        )


if __name__ == "__main__":
    main()
