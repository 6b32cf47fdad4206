"""Scores of single experts against elimination, picking and healing, on nano: 8 families × keep 12, 10, 8, 6.

    python -m experiments.better WORK --report docs/better.md
    python -m experiments.better WORK --model nano-1/model --seed 1 --report docs/better-1.md

All choices and healings of a family see the same calibration questions; the evaluation questions are none that any
variant of the method was looked at with. Stopped at any time, the same command goes on.
"""

import os
from pathlib import Path

import click
import jax

from convert.sources import locate

from ..nano.families import FAMILIES
from . import page
from .candidates import Choices
from .material import questions
from .measure import Judge, save

KEEP = (8, 10, 12, 6)
FULL = "full"


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--model", default="nano", show_default=True)
@click.option("--seed", default=0, show_default=True, help="That of the model, from which its questions follow.")
@click.option("--keep", type=int, multiple=True, default=KEEP, show_default=True)
@click.option("--family", type=click.Choice([*FAMILIES]), multiple=True, help="[default: all]")
@click.option("--questions", "count", default=200, show_default=True, help="Of each family, to answer.")
@click.option("--calibration", default=200, show_default=True, help="Of each family.")
@click.option("--seeds", default=3, show_default=True, help="Of each healing.")
@click.option("--report", type=click.Path(path_type=Path), help="The file of the report.  [default: WORK/better.md]")
def main(
    work: Path,
    model: str,
    seed: int,
    keep: tuple[int, ...],
    family: tuple[str, ...],
    count: int,
    calibration: int,
    seeds: int,
    report: Path | None,
) -> None:
    """Choose, heal, answer, and write the report."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    work.mkdir(parents=True, exist_ok=True)
    # Every candidate is another model of the same shapes.
    jax.config.update("jax_compilation_cache_dir", str((work / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    folder, families = Path(str(locate(model))), family or tuple(FAMILIES)
    for number in keep:
        for name in families:
            asked = questions(folder, name, seed, calibration, count, work)
            choices, judge = Choices(folder, asked, work), Judge(folder, asked.evaluation)
            results = work / "results" / name
            results.mkdir(parents=True, exist_ok=True)
            if not (file := results / f"{FULL}.npy").exists():
                save(file, judge.of(None, {}))
            for one in choices.all(number, seeds):
                if not (file := results / f"{one.name}.npy").exists():
                    save(file, found := judge.of(one.layers, choices.values(one)))
                    click.echo(f"{name}: {one.name}: {100 * found[:, 0].mean():.1f} % right")
    keeps = " ".join(f"--keep {number}" for number in keep)
    command = f"python -m experiments.better WORK --model {model} --seed {seed} --seeds {seeds} {keeps}"
    page.write(page.Found(work, families, seeds, command), keep, report or work / "better.md")


if __name__ == "__main__":
    main()
