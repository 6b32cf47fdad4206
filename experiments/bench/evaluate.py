"""`eval` of many keep-sets beside one: does one pass of all cost less than passes of each?

    python -m experiments.bench.evaluate [--model MODEL] [--keep-sets 10] [--pairs 3]
    python -m experiments.checkpoints MODEL --preset 20b
    python -m experiments.bench.evaluate --model MODEL --only streamed --blocks 8 --pairs 0

Each run is a process of its own, and its whole time counts. Keep-sets are drawn at random, of three quarters of the
experts; rows are those of nano's questions, or of Python's docs for other models.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

import click
import numpy as np

from convert.sources import NANO, open_source

from .. import measure
from ..nano import QUESTIONS
from ..nano.families import read
from ..nano.specialise import write_rows as write_questions
from .today import write_rows


def write_keep_sets(folder: Path, model: str, count: int) -> list[Path]:
    """So many files."""
    config, files = open_source(model).config, []
    for number in range(count):
        rng, kept = np.random.default_rng(number), 3 * config.num_experts // 4
        layers = [sorted(rng.permutation(config.num_experts)[:kept].tolist()) for _ in range(config.num_layers)]
        files.append(folder / f"keep-{number}.json")
        files[-1].write_text(json.dumps(layers))
    return files


@click.command()
@click.option("--model", default=NANO, show_default=True, help="A folder, or nano.")
@click.option("--keep-sets", "count", type=click.IntRange(1), default=10, show_default=True)
@click.option("--only", "engine", type=click.Choice(["resident", "streamed"]), default="resident", show_default=True)
@click.option("--blocks", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seq-len", type=click.IntRange(2), default=1024, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--memory-gib", type=float, help="The most memory that a run may take.")
@click.option("--pairs", type=click.IntRange(0), default=3, show_default=True, help="With 0 one run of one keep-set.")
def main(
    model: str,
    count: int,
    engine: str,
    blocks: int,
    seq_len: int,
    dtype: str,
    memory_gib: float | None,
    pairs: int,
) -> None:
    """Print one row: seconds with one and with many, and their ratio."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "rows.jsonl"
        if model == NANO:
            write_questions(data, Path(str(open_source(NANO).folder)), read(QUESTIONS / "evaluation.jsonl"))
        else:
            write_rows(data, Path(model), None, 4 * blocks, seq_len // 2)
        files = write_keep_sets(folder, model, count)
        fixed = ["--data", data, "--keep", "all", "--seq-len", seq_len, "--blocks", blocks, "--engine", engine]
        fixed += ["--dtype", dtype, "--out", folder / "out", "--overwrite"]
        fixed += ["--memory-gib", memory_gib] if memory_gib else []

        def seconds(several: list[Path]) -> measure.Cost:
            return measure.program("eval", model, *fixed, *(word for file in several for word in ("--keep-sets", file)))

        if not pairs:
            seconds(files[:1])
            return
        costs = [[seconds(files[:1]), seconds(files)] for _ in range(pairs + 1)][1:]  # the first pair reads the disk
        one, many = ([cost[n].seconds for cost in costs] for n in range(2))
        ratios = [b / a for a, b in zip(one, many, strict=True)]
        peak = max(cost[1].peak_gib for cost in costs)
        click.echo(f"\n| model | one, s | {count}, s | ratio | peak, GiB |\n|---|---:|---:|---|---:|")
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        shown = f"{statistics.median(one):.1f} | {statistics.median(many):.1f} | {spread} | {peak:.2f}"
        click.echo(f"| {Path(model).name}, {engine}, {blocks} × {seq_len:,} | {shown} |")


if __name__ == "__main__":
    main()
