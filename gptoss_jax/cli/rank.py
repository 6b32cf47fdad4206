"""The command `rank`."""

import os
from typing import Any

import click

from ..selection.criteria import CRITERIA, LETTERS
from . import terminal
from .options import MODEL, PATH

CRITERION_HELP = "\n".join(
    [
        f"The score; experts with a higher one stay. {LETTERS}\n\n\b",
        *(f"{criterion.name}: {criterion.help}" for criterion in CRITERIA.values()),
    ]
)


@click.command()
@click.argument("profile", type=MODEL)
@click.option("--criterion", type=click.Choice([*CRITERIA]), default="reap", help=CRITERION_HELP)
@click.option("--domain", help="Ranks by the statistics of this domain alone.")
@click.option("--seed", type=click.IntRange(0), default=0, help="The seed of criteria that draw.")
@click.option("--out", type=PATH, default="ranking.json", help="The file for the ranking.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing file.")
def rank(profile: Any, out: Any, **options: Any) -> None:
    """Rank the experts of each layer, best first.

    PROFILE is a profile's folder or a saliency.parquet; for a criterion of the weights alone a MODEL stands in its
    place, as the command profile takes it. The file says by which criterion and over which data it ranks.
    """
    # No device is needed, and on one host of many JAX would wait for the others.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..interface import choosing
    from ..run.bar import bar

    ranking = choosing.rank(profile, out=out, progress=bar, **options)
    terminal.report(f"{len(ranking.layers)} layers of {len(ranking.layers[0])} experts {ranking.origin}: {out}")
