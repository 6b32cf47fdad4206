"""`profile` with --trace and without, in turns: what does it cost to keep what each token chose, and to write it?

    python -m experiments.bench.traces [--model MODEL] [--pairs 5]

MODEL is a checkpoint of two layers of gpt-oss-20b's shape (`python -m experiments.checkpoints MODEL --preset 20b
--layers 2`), which runs by either engine, as nano does. Both runs of a pair are in one process, right after each other,
so that a ratio is of the same machine. The time is that of the whole job but compiling: rows, weights, steps, what is
kept, and what is written. Processor time is of all of it, and minds other programs less.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click

import gptoss_jax as gj
from convert.sources import NANO, open_source

from ..nano import QUESTIONS
from ..nano.families import read
from ..nano.specialise import write_rows as write_questions
from .today import write_rows

ENGINES = ("resident", "streamed")


class Took(NamedTuple):
    """What a run took."""

    seconds: float
    processor: float
    trace_bytes: float
    """Of each token."""


def run(folder: Path, model: str, traced: bool, options: dict[str, Any]) -> Took:
    """One profile, whose outputs are removed."""
    out, trace = folder / "out", folder / "trace"
    start = time.perf_counter(), time.process_time()
    made = gj.profile(model, folder / "rows.jsonl", out=out, trace=trace if traced else None, **options)
    whole, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    size = sum(file.stat().st_size for file in trace.glob("part-*")) if traced else 0
    for written in (out, trace):
        shutil.rmtree(written, ignore_errors=True)
    return Took(whole - made.info["compile_seconds"], processor, size / made.info["total_tokens"])


def compared(folder: Path, model: str, pairs: int, options: dict[str, Any]) -> str:
    """The cells of a row: seconds without and with, their ratios, and bytes."""
    runs: tuple[list[Took], list[Took]] = ([], [])
    for pair in range(pairs + 1):
        for way in (0, 1) if pair % 2 else (1, 0):
            runs[way].append(run(folder, model, bool(way), options))
    without, with_ = (way[1:] for way in runs)  # the first pair warms up
    shown = [[b[i] / a[i] for a, b in zip(without, with_, strict=True)] for i in range(2)]
    ratios = [f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in shown]
    middle = [f"{statistics.median(took.seconds for took in way):.2f}" for way in (without, with_)]
    return " | ".join([*middle, *ratios, f"{with_[0].trace_bytes:.0f}"])


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="Without it nano alone is run.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--questions", type=click.IntRange(1), default=800, show_default=True, help="Rows of nano.")
@click.option("--rows", type=click.IntRange(1), default=32, show_default=True, help="Rows of 256 tokens of MODEL.")
def main(model: Path | None, pairs: int, questions: int, rows: int) -> None:
    """Print a row for each model and engine: with --trace over without, median and range."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    click.echo("| profile | without, s | with, s | with / without | processor time, with / without | bytes a token |")
    click.echo("|---|---:|---:|---|---|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_questions(folder / "rows.jsonl", Path(str(open_source(NANO).folder)), _several(questions))
        for engine in ENGINES:
            options = {"engine": engine, "max_seq_length": 256, "batch_size": 32}
            cells = compared(folder, NANO, pairs, options)
            click.echo(f"| nano, {engine}, {questions} questions | {cells} |")
        if model:
            write_rows(folder / "rows.jsonl", model, None, rows, 256)
            for engine in ENGINES:
                options = {"engine": engine, "max_seq_length": 256, "batch_size": 16}
                cells = compared(folder, str(model), pairs, options)
                click.echo(f"| two layers of 20b, {engine}, {rows} × 256 tokens | {cells} |")


def _several(count: int) -> list[Any]:
    """So many questions, again and again the same ones."""
    every = read(QUESTIONS / "calibration.jsonl")
    return [every[n % len(every)] for n in range(count)]


if __name__ == "__main__":
    main()
