"""The streamed engine over more and more rows: time for each token, and memory.

    python -m experiments.checkpoints MODEL --preset 20b
    python -m experiments.bench.stream MODEL --rows 20x512

Each case is a process of its own; every token counts. Time is of the steps alone and by layer, so that models with some
of the layers tell what all would take; hidden states are those of all rows between two layers, in bfloat16.
"""

import json
import os
import shlex
import tempfile
from pathlib import Path

import click

from .. import measure
from .today import write_rows

GIB = 1 << 30
CASES = "10x512,32x512,64x512,160x512"  # one batch that is small, one, two and five that are full


def case(model: Path, texts: Path | None, rows: int, length: int, options: list[str]) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as name:
        data, out = Path(name) / "rows.jsonl", Path(name) / "profile"
        write_rows(data, model, texts, rows, length)
        fixed = ("--data", data, "--max-seq-length", length, "--keep", "all", "--engine", "streamed")
        cost = measure.program("profile", model, *fixed, *options, "--out", out)
        info = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tokens, layers = info["total_tokens"], info["num_layers"]
    hidden = 2 * tokens * config["hidden_size"] / GIB
    each = info["seconds"] / tokens / layers * 1e6
    rate, compiling = info["tokens_per_s"], info["compile_seconds"]
    return (
        f"| {rows} × {length:,} | {tokens:,} | {rate:,.1f} | {each:,.0f} | {compiling:.0f} | "
        f"{cost.seconds:,.0f} | {cost.peak_gib:.2f} | {hidden:.2f} |"
    )


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--rows", "cases", default=CASES, show_default=True, help="Rows × tokens, in turn.")
@click.option("--texts", type=click.Path(path_type=Path, exists=True), help="Question sets.  [default: Python's docs]")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Times that all cases run.")
@click.option("--ours", default="", help='Further options of profile, e.g. "--memory-gib 4".')
def main(model: Path, cases: str, texts: Path | None, rounds: int, ours: str) -> None:
    """Print the table."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sizes = [tuple(map(int, one.split("x"))) for one in cases.split(",")]
    lines = [case(model, texts, *size, shlex.split(ours)) for _ in range(rounds) for size in sizes]
    click.echo(
        "\n| rows | tokens | tokens/s | µs a token and layer | compiling, s | whole process, s | peak, GiB | hidden |"
    )
    click.echo("|---|---:|---:|---:|---:|---:|---:|---:|")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
